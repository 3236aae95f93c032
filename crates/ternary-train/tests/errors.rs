//! Every error says what is wrong with what.

use ndarray::Array2;
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
