//! Conversion of slices, over all 2^16 values of the 16-bit types.

use half::{bf16, f16};
use tensor_utils::testing::Seeded;
use tensor_utils::{Element, narrow, widen};

/// All values of a 16-bit type; under Miri, which takes minutes for a thousand of them, some.
fn all<T>(from_bits: fn(u16) -> T) -> Vec<T> {
    let stride = if cfg!(miri) { 509 } else { 1 };
    (0..=u16::MAX).step_by(stride).map(from_bits).collect()
}

/// The f32 around every step of rounding to 16 bits: each value of the type, the middle between it
/// and the next, and their neighbours.
fn around<T: Element>(values: &[T]) -> Vec<f32> {
    let steps = values.windows(2).flat_map(|pair| {
        let [low, high] = [pair[0].to_f64() as f32, pair[1].to_f64() as f32];
        [low, (low + high) / 2.0]
    });
    steps.flat_map(|x| [x.next_down(), x, x.next_up()]).collect()
}

fn check<T: Element<Acc = f32>>(
    from_bits: fn(u16) -> T,
    to_f32: fn(T) -> f32,
    from_f32: fn(f32) -> T,
) {
    let values = all(from_bits);
    let mut wide = vec![0.0; values.len()];
    widen(&values, &mut wide);
    for (&value, &wide) in values.iter().zip(&wide) {
        let want = to_f32(value);
        assert!(wide.to_bits() == want.to_bits() || (wide.is_nan() && want.is_nan()));
        assert_eq!(wide.is_nan(), value.to_f64().is_nan());
        assert_eq!(value.to_acc().to_bits(), wide.to_bits());
    }

    let mut specials = vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX];
    // A NaN whose payload is in the bits that are dropped, and one that a carry would overflow.
    specials.extend([0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff].map(f32::from_bits));
    specials.extend(Seeded::new(1).normal::<f32, _>(if cfg!(miri) { 100 } else { 10_000 }));
    for inputs in [around(&values), wide, specials] {
        let mut narrowed = vec![T::default(); inputs.len()];
        narrow(&inputs, &mut narrowed);
        for (&input, &got) in inputs.iter().zip(&narrowed) {
            let want = from_f32(input);
            let both_nan = got.to_f64().is_nan() && want.to_f64().is_nan();
            assert!(got.bits() == want.bits() || both_nan, "{input:e}: {got:?}, want {want:?}");
            assert_eq!(T::from_acc(input).bits(), got.bits());
        }
    }
}

#[test]
fn bf16_is_exact_up_and_nearest_even_down() {
    check(bf16::from_bits, bf16::to_f32, bf16::from_f32);
}

#[test]
fn f16_is_exact_up_and_nearest_even_down() {
    check(f16::from_bits, f16::to_f32, f16::from_f32);
}

#[test]
fn every_length_is_converted_to_its_end() {
    fn check<T: Element>() {
        let values = Seeded::new(2).normal::<T, _>(70).into_raw_vec_and_offset().0;
        for len in 0..values.len() {
            let mut wide = vec![T::Acc::default(); len];
            widen(&values, &mut wide);
            let mut back = vec![T::default(); len + 1];
            narrow(&wide, &mut back);
            assert_eq!(back[..len], values[..len]);
            assert_eq!(back[len], T::default());
        }
    }
    check::<f32>();
    check::<f64>();
    check::<bf16>();
    check::<f16>();
}
