//! StarCoder 2: layer norms with biases, and a feed-forward layer without gates.

use qp_codegen::reference::Activation;

use super::decoder::{self, Kind, Style, decoder};
use super::llama::LLAMA;
use super::{Architecture, Window};

const STYLE: Style = Style { norm: Kind::LayerWithBias, gated: false, ..decoder::LLAMA };

/// StarCoder 2.
pub const STARCODER2: Architecture = Architecture {
    name: "Starcoder2ForCausalLM",
    model_type: "starcoder2",
    kv_heads: Some(2),
    attention_bias: false,
    mlp_bias: false,
    window: Window::Always(None),
    norm_eps: "norm_epsilon",
    default_eps: 1e-5,
    activation: Activation::GeluTanh,
    tied: true,
    read: |keys, config| {
        let bias = keys.truth("use_bias")?.unwrap_or(true);
        (config.qkv_bias, config.o_bias, config.mlp_bias) = (bias, bias, bias);
        keys.ignore(&["residual_dropout"]);
        Ok(())
    },
    program: |config| decoder(config, &STYLE),
    ..LLAMA
};
