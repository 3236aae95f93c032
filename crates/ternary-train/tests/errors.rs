//! Every error says what is wrong with what.

use ndarray::Array2;
use ternary_train::ops::{
    CrossEntropy, Direction, IGNORE, OpError, Rope, cross_entropy, embed, fake_quantize_rows,
    rotate,
};
use ternary_train::{Config, Preset, Projection, Rule, Ternary, Weights};

#[test]
fn groups_without_a_scale_are_named() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for rule in Rule::ALL {
            let mut w = Array2::ones((3, 200));
            w[[2, 130]] = bad;
            let projection = Projection { rule, ..Projection::default() };
            let error = projection.project(&w).unwrap_err().to_string();
            assert_eq!(error, "`w`, row 2, columns 128 to 199: NaN or infinity among the weights");
            assert!(projection.project_into(&mut w.clone(), &w).is_err());
        }
    }
    let error = Projection::default().project(&Array2::from_elem((1, 5), 1e6)).unwrap_err();
    assert!(error.to_string().contains("65504"), "{error}");
    let error = Ternary::of_ternary(&Array2::from_elem((1, 5), 0.1), 128).unwrap_err();
    assert!(error.to_string().contains("not an f16"), "{error}");
}

#[test]
fn group_sizes_and_layouts_are_checked() {
    for group in [0, 1, 16, 48, 257, 512] {
        let projection = Projection { group, ..Projection::default() };
        let error = projection.project(&Array2::zeros((1, 1))).unwrap_err().to_string();
        assert!(error.starts_with("option `group`"), "{error}");
        assert!(Ternary::of_ternary(&Array2::zeros((1, 1)), group).is_err());
    }
    let w = Array2::zeros((4, 6));
    assert!(Projection::default().project_into(&mut Array2::zeros((6, 4)), &w).is_err());
    let turned = Array2::zeros((6, 4)).reversed_axes();
    let error = Projection::default().project_into(&mut Array2::zeros((4, 6)), &turned);
    assert!(error.unwrap_err().to_string().contains("row-major"));
}

#[test]
fn configurations_that_make_no_model_are_refused() {
    let good = Preset::Nano.config(256);
    assert_eq!(Config::from_json(&good.to_json()).unwrap(), good);
    let replaced = |from: &str, to: &str| {
        let text = good.to_json();
        assert!(text.contains(from), "{from}");
        Config::from_json(&text.replace(from, to)).unwrap_err().to_string()
    };
    for (from, to, named) in [
        ("\"qwen3\"", "\"llama\"", "model_type"),
        ("\"attention_bias\": false", "\"attention_bias\": true", "attention_bias"),
        ("\"use_sliding_window\": false", "\"use_sliding_window\": true", "use_sliding_window"),
        ("\"silu\"", "\"gelu\"", "hidden_act"),
        ("\"default\"", "\"yarn\"", "rope_type"),
        ("\"num_attention_heads\": 4", "\"num_attention_heads\": 3", "num_attention_heads"),
        ("\"head_dim\": 32", "\"head_dim\": 33", "head_dim"),
        ("\"vocab_size\": 256", "\"vocab_size\": 0", "vocab_size"),
        ("\"rms_norm_eps\": 1e-6", "\"rms_norm_eps\": -1", "rms_norm_eps"),
        ("\"hidden_size\"", "\"width\"", "hidden_size"),
        ("\"eos_token_id\": null", "\"eos_token_id\": 256", "eos_token_id"),
    ] {
        let error = replaced(from, to);
        assert!(error.starts_with("config: ") && error.contains(named), "{error}");
    }
}

#[test]
fn files_are_named_in_errors() {
    let error = Config::read("no/such/config.json".as_ref()).unwrap_err().to_string();
    assert_eq!(error, "cannot read or write no/such/config.json");
}

#[test]
fn weights_are_held_to_the_configuration() {
    let config = Preset::Nano.config(64);
    let weights = Weights::random(&config, 1).unwrap();
    weights.check(&config).unwrap();
    let mut wrong = weights.clone();
    wrong.layers[1].up = Array2::zeros((2, 2));
    assert!(wrong.check(&config).unwrap_err().to_string().contains("`up`"));
    wrong.layers.pop();
    assert!(wrong.check(&config).unwrap_err().to_string().contains("num_hidden_layers"));
    let untied = Config { tie_word_embeddings: false, ..config };
    assert!(weights.check(&untied).unwrap_err().to_string().contains("tie_word_embeddings"));
}

#[test]
fn operations_without_elements_do_nothing() {
    let (mut losses, mut dx) = ([1.0_f32; 3], [1.0; 6]);
    let gradients = CrossEntropy { dx: &mut dx, d_head: &mut [], scale: 1.0 };
    let targets = [IGNORE; 3];
    let correct = cross_entropy(&mut losses, &[0.5; 6], &[], &targets, 2, Some(gradients));
    assert_eq!((correct.unwrap(), losses, dx), (0, [0.0; 3], [0.0; 6]));
    assert!(cross_entropy(&mut [0.0_f32], &[], &[], &[0], 0, None).is_err());

    let rope = Rope::<f32>::new(4, 1e4, 3);
    rotate(&mut [], 0, 4, 3, &rope, Direction::Forward).unwrap();
    rotate(&mut [], 2, 4, 0, &rope, Direction::Forward).unwrap();
}

#[test]
fn sizes_whose_product_is_too_large_are_named() {
    let huge = usize::MAX / 2 + 1;
    let too_large = |result: Result<(), OpError>| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("`x`"), "{error}");
    };
    too_large(cross_entropy::<f32>(&mut [0.0; 2], &[], &[], &[IGNORE; 2], huge, None).map(drop));
    too_large(embed::<f32>(&mut [], &[], &[0, 0], huge));
    let rope = Rope::<f32>::new(4, 1e4, 3);
    too_large(rotate(&mut [], huge, 4, 3, &rope, Direction::Forward));
    let mut x = [1.0_f32, -0.5];
    fake_quantize_rows(&mut x, huge);
    assert_eq!(x[0], 1.0);
}
