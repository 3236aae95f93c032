//! Sizes that others have published.

use ternary_train::{Config, Preset};

#[test]
fn presets_have_their_sizes() {
    let sizes = Preset::ALL.map(|preset| preset.config(256).parameters());
    assert_eq!(sizes, [820_608, 3_214_080, 19_012_864]);
}

#[test]
fn the_small_qwen3_has_its_number_of_weights() {
    // As published: 0.6B parameters, 0.44B of them not in the embedding.
    let text = r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "rope_theta": 1000000,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128,
        "num_key_value_heads": 8, "max_position_embeddings": 40960, "tie_word_embeddings": true,
        "rope_scaling": null, "eos_token_id": 151645}"#;
    let config = Config::from_json(text).unwrap();
    assert_eq!(config.parameters(), 596_049_920);
    assert_eq!((config.rope_theta, config.rms_norm_eps), (1e6, 1e-6));
    let inside =
        text.replace("\"rope_theta\": 1000000", "\"rope_parameters\": {\"rope_theta\": 5e5}");
    assert_eq!(Config::from_json(&inside).unwrap().rope_theta, 5e5);
}
