//! Models that benchmarks are made for without having them: shapes and quantizers, no weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use qp_codegen::ir::Elem;

use crate::cli::Error;
use crate::engine::Precision;
use crate::engine::cuda::layout::{Form, Layout};
use crate::model::{Config, LayerId, arch};
use crate::plan::{self, Plan, Spec};
use crate::quantize::items::{join_tied, layers};

/// What matters of Llama 3.1 8B's `config.json`.
const LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0}"#;
/// A model that the interpreter runs.
const TINY: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 10000.0}"#;

/// 3.23 bits a weight in decoder blocks, 4 in the output layer.
const MIXED: &str = r#"default = "fast_3"

[layers]
"model.layers.*.self_attn.{q,k,v,o}_proj" = "fast_3.5"
"model.layers.*.mlp.down_proj" = "fast_3.5"
"lm_head" = "tcq_4"
"#;

/// Shapes that need no model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Shapes {
    /// Those of Llama 3.1 8B.
    #[default]
    #[value(name = "llama-8b")]
    Llama,
    /// Those of a model so small that the interpreter runs it.
    Tiny,
}

/// Which model, in which quantizers.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Shapes of the model.
    #[arg(long, value_enum, default_value = "llama-8b")]
    pub shapes: Shapes,
    /// Model directory or GGUF file whose configuration is taken instead.
    #[arg(long, value_name = "MODEL", conflicts_with = "shapes")]
    pub model: Option<PathBuf>,
    /// Quantizer of every matrix of the decoder blocks: a name of the palette, a spec file, or FILE:NAME [default: a mix].
    #[arg(long, conflicts_with = "plan")]
    pub spec: Option<String>,
    /// A plan in place of one quantizer.
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
}

impl ModelArgs {
    /// The text of its `config.json`.
    ///
    /// # Errors
    /// A model whose configuration cannot be read.
    pub fn config_text(&self) -> Result<String, Error> {
        Ok(match (&self.model, self.shapes) {
            (Some(model), _) => {
                let bytes = crate::model::Files::open(model)?.read("config.json")?.unwrap_or_default();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            (None, Shapes::Llama) => LLAMA.to_owned(),
            (None, Shapes::Tiny) => TINY.to_owned(),
        })
    }

    /// Name of the quantizers, for tables.
    pub fn quantizers(&self) -> String {
        match (&self.plan, &self.spec) {
            (Some(plan), _) => plan.display().to_string(),
            (None, Some(spec)) => spec.clone(),
            (None, None) => "a mix of fast_3, fast_3.5 and tcq_4".to_owned(),
        }
    }

    /// The matrices of the model.
    ///
    /// # Errors
    /// A model, quantizer or plan that cannot be read.
    pub fn layout(&self, cache: Precision) -> Result<Layout, Error> {
        let config = match &self.model {
            Some(model) => Config::read(model)?,
            None => Config::parse(Path::new("config.json"), &self.config_text()?)?,
        };
        let program = Arc::new(arch::program(&config));
        let plan = match (&self.plan, &self.spec) {
            (Some(file), _) => Plan::read(file)?,
            (None, Some(spec)) => Plan::uniform(spec),
            (None, None) => Plan::parse("the mix", MIXED, PathBuf::new())?,
        };
        let layers: Vec<plan::Layer> = layers(&program).into_iter().map(|place| place.layer).collect();
        let mut resolved = plan.resolve(&layers)?;
        join_tied(&program, &mut resolved);
        let form = |id: LayerId| match (resolved.layers[id.0].map(|s| &resolved.specs[s]), program.layer(id).shares) {
            (Some(Spec::Quantizer(q)), _) => Ok(Form::Packed(q.clone())),
            (Some(Spec::Format(f)), _) => Err(format!(
                "`{}` is a format: `qp bench formats` times its products, and this command the palette's quantizers",
                f.format().name
            )),
            (None, Some(_)) => Ok(Form::Shared),
            (None, None) => Ok(Form::Dense(Elem::BF16)),
        };
        let forms: Vec<Form> = program.ids().map(form).collect::<Result<_, String>>()?;
        let fused: Vec<Vec<LayerId>> =
            resolved.groups.iter().map(|g| g.iter().copied().map(LayerId).collect()).collect();
        Ok(Layout::new(&program, &forms, &fused, cache))
    }
}
