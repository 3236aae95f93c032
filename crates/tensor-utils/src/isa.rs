//! Which instruction set a kernel runs on, chosen at run time.
//!
//! A kernel is written once, generic over [`Simd`], and [`dispatch`] instantiates it for each
//! instruction set. `docs/decisions/0001-simd.md` has the figures behind the choice of
//! `fearless_simd` for the vectors.

use std::ffi::OsStr;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use fearless_simd::{Level, Simd};
use thiserror::Error;

#[cfg(target_arch = "x86_64")]
use crate::tile::pairs::Bf16Dot;

/// The environment variable that forces an instruction set: `portable`, `avx2`, `avx512` or
/// `avx512bf16`.
const VARIABLE: &str = "KERNELS_ISA";

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// What every machine of the target has: SSE2 on x86-64, NEON on AArch64, SIMD128 on wasm32
    /// when it is enabled, plain scalar code elsewhere.
    Portable,
    /// AVX2 with FMA (x86-64-v3).
    Avx2,
    /// AVX-512 as Ice Lake and Zen 4 have it.
    Avx512,
    /// [`Isa::Avx512`], and `vdpbf16ps`: two products of bf16 where there would be one of `f32`. For
    /// kernels that have a use for it; the others do what they do on `Avx512`, bit for bit.
    Avx512Bf16,
}

/// An instruction set was asked for that this machine does not have, or that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IsaError {
    /// The processor lacks it.
    #[error("instruction set `{0}` was asked for, but this processor does not have it")]
    Unavailable(Isa),
    /// No such name.
    #[error("KERNELS_ISA is `{0}`; it must be `portable`, `avx2`, `avx512` or `avx512bf16`")]
    Unknown(String),
}

impl Isa {
    /// All instruction sets, from the narrowest to the widest.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Self::Avx2 => Level::new().as_avx2().is_some(),
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Self::Avx512 => Level::new().as_avx512().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => self.bf16_dot().is_some(),
            #[cfg(target_arch = "x86")]
            Self::Avx512Bf16 => false,
            #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
            _ => false,
        }
    }

    /// The instruction sets that this machine can run, from the narrowest to the widest.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// What multiplies pairs of bf16, on the instruction set that has it.
    #[cfg(target_arch = "x86_64")]
    pub fn bf16_dot(self) -> Option<Bf16Dot> {
        if self == Self::Avx512Bf16 { Bf16Dot::detect() } else { None }
    }

    /// Whether kernels use it unasked where it is available. `vdpbf16ps` has twice the speed of `f32`
    /// on AMD's Zen 4 and 5 (families 19h and 1Ah; the other processors of 19h lack it) and half of it on
    /// Intel's Sapphire Rapids; elsewhere it has not been measured.
    fn is_fast(self) -> bool {
        self != Self::Avx512Bf16 || amd_family().is_some_and(|family| family >= 0x19)
    }

    /// The instruction set that kernels use unless told otherwise: the one that the environment
    /// variable `KERNELS_ISA` names, or the widest this machine has, [`Isa::Avx512Bf16`] only where it
    /// is known to be fast: on AMD's Zen 4 and later. Read once per process.
    ///
    /// # Errors
    /// [`IsaError`] if the variable names an unknown or missing instruction set: a path that was
    /// asked for is never replaced by another.
    pub fn active() -> Result<Self, IsaError> {
        static ACTIVE: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        ACTIVE.get_or_init(|| Self::from_variable(std::env::var_os(VARIABLE).as_deref())).clone()
    }

    /// The one that a caller asked for, or else [`Isa::active`].
    ///
    /// # Errors
    /// [`IsaError::Unavailable`] if this machine does not have it; those of [`Isa::active`].
    pub fn resolve(asked: Option<Self>) -> Result<Self, IsaError> {
        match asked {
            None => Self::active(),
            Some(isa) if isa.is_available() => Ok(isa),
            Some(isa) => Err(IsaError::Unavailable(isa)),
        }
    }

    fn from_variable(value: Option<&OsStr>) -> Result<Self, IsaError> {
        let Some(name) = value else {
            return Ok(Self::available()
                .filter(|isa| isa.is_fast())
                .last()
                .unwrap_or(Self::Portable));
        };
        // What is not UTF-8 is no name either.
        let isa: Self = name.to_string_lossy().parse()?;
        if isa.is_available() { Ok(isa) } else { Err(IsaError::Unavailable(isa)) }
    }

    /// The name that `KERNELS_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| IsaError::Unknown(name.to_owned()))
    }
}

/// A computation written once for all instruction sets.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// Runs on the instruction set that `simd` stands for.
    ///
    /// Called outside any `#[target_feature]`: wrap the hot parts in [`Simd::vectorize`] and mark
    /// everything they call `#[inline(always)]`, or they compile for the target's baseline.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` on `isa`.
///
/// # Errors
/// [`IsaError::Unavailable`] if this machine does not have it.
pub fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> Result<K::Output, IsaError> {
    match isa {
        Isa::Portable => Ok(run_portable(kernel)),
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Isa::Avx2 => match Level::new().as_avx2() {
            Some(simd) => Ok(kernel.run(simd)),
            None => Err(IsaError::Unavailable(isa)),
        },
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Isa::Avx512 => match Level::new().as_avx512() {
            Some(simd) => Ok(kernel.run(simd)),
            None => Err(IsaError::Unavailable(isa)),
        },
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Isa::Avx512Bf16 if isa.is_available() => dispatch(Isa::Avx512, kernel),
        Isa::Avx512Bf16 => Err(IsaError::Unavailable(isa)),
        #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
        _ => Err(IsaError::Unavailable(isa)),
    }
}

/// The family of a processor by AMD.
#[cfg(target_arch = "x86_64")]
fn amd_family() -> Option<u32> {
    use core::arch::x86_64::__cpuid;
    let vendor = __cpuid(0);
    if [vendor.ebx, vendor.edx, vendor.ecx]
        != [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes)
    {
        return None;
    }
    let signature = __cpuid(1).eax;
    let (base, extended) = (signature >> 8 & 0xf, signature >> 20 & 0xff);
    Some(if base == 0xf { base + extended } else { base })
}

#[cfg(not(target_arch = "x86_64"))]
fn amd_family() -> Option<u32> {
    None
}

#[cfg(target_arch = "x86_64")]
fn run_portable<K: Kernel>(kernel: K) -> K::Output {
    let sse2 = Level::new().as_sse2().expect("x86-64 always has SSE2");
    kernel.run(sse2)
}

#[cfg(not(target_arch = "x86_64"))]
fn run_portable<K: Kernel>(kernel: K) -> K::Output {
    fearless_simd::dispatch!(Level::baseline(), simd => kernel.run(simd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variable_selects_or_names_the_mistake() {
        let widest = Isa::available().filter(|isa| isa.is_fast()).last().unwrap();
        assert_eq!(Isa::from_variable(None), Ok(widest));
        let from_name = |name: &str| Isa::from_variable(Some(OsStr::new(name)));
        assert_eq!(from_name("portable"), Ok(Isa::Portable));
        assert_eq!(from_name("sse9"), Err(IsaError::Unknown("sse9".to_owned())));
        assert_eq!(from_name(""), Err(IsaError::Unknown(String::new())));
        for isa in Isa::ALL {
            let expected =
                if isa.is_available() { Ok(isa) } else { Err(IsaError::Unavailable(isa)) };
            assert_eq!(from_name(isa.name()), expected);
        }
    }

    #[cfg(unix)]
    #[test]
    fn variable_that_is_no_text_is_a_mistake() {
        use std::os::unix::ffi::OsStrExt;
        let value = OsStr::from_bytes(b"avx2\xff");
        let error = IsaError::Unknown("avx2\u{fffd}".to_owned());
        assert_eq!(Isa::from_variable(Some(value)), Err(error));
    }

    #[test]
    fn dispatch_runs_the_path_that_was_asked_for() {
        struct Lanes;
        impl Kernel for Lanes {
            type Output = usize;
            fn run<S: Simd>(self, _: S) -> usize {
                <S::f32s as fearless_simd::SimdBase<S>>::LEN
            }
        }
        for isa in Isa::available() {
            let lanes = dispatch(isa, Lanes).unwrap();
            match isa {
                Isa::Portable => assert!(lanes <= 4),
                Isa::Avx2 => assert_eq!(lanes, 8),
                Isa::Avx512 | Isa::Avx512Bf16 => assert_eq!(lanes, 16),
            }
        }
    }
}
