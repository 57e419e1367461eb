//! `unisono init-model`: a new model directory from a corpus.

use super::screen::Reading;
use super::{print, Error, Result};
use crate::model::{init, Dtype, Plan, Split};
use clap::ValueEnum;
use std::path::PathBuf;
use unisono_configs::model::Family;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono init-model models/tiny --data corpus.jsonl --vocab 4096 --layers 6 --hidden 384 --heads 6
  python3 -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('models/tiny')\"")]
pub struct Args {
    /// Directory to create
    pub out: PathBuf,
    /// Files whose strings the tokenizer is trained on: .jsonl, .json or .parquet, directories or globs
    #[arg(long, num_args = 1.., required = true, value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Only these fields of the rows [default: all that are strings]
    #[arg(long = "field", value_name = "NAME")]
    pub fields: Vec<String>,
    /// Architecture
    #[arg(long, value_enum, default_value_t = FamilyName::Llama)]
    pub family: FamilyName,
    /// Most tokens of the tokenizer
    #[arg(long, default_value_t = 8192)]
    pub vocab: usize,
    /// What no token may join
    #[arg(long, value_enum, default_value_t = Split::Words)]
    pub split: Split,
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    #[arg(long, default_value_t = 256)]
    pub hidden: usize,
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Heads of keys and values [default: --heads]
    #[arg(long)]
    pub kv_heads: Option<usize>,
    /// [default: --hidden / --heads]
    #[arg(long)]
    pub head_dim: Option<usize>,
    /// Width of the MLP [default: 8/3 of --hidden, rounded up to a multiple of 64]
    #[arg(long)]
    pub intermediate: Option<usize>,
    /// Longest sequence, tokens
    #[arg(long, default_value_t = 2048)]
    pub max_positions: usize,
    #[arg(long, default_value_t = 10_000.0)]
    pub rope_theta: f64,
    /// Whether the head's matrix is the embedding's
    #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub tied: bool,
    /// How weights are stored
    #[arg(long, value_enum, default_value_t = Dtype::Fp32)]
    pub dtype: Dtype,
    /// Standard deviation of the random matrices
    #[arg(long, default_value_t = 0.02)]
    pub deviation: f64,
    /// The same seed and corpus make the same bytes
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// Architectures by the name of their model_type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FamilyName {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Args {
    /// With every default in its place.
    pub fn plan(self) -> Plan {
        Plan {
            head_dim: self.head_dim.unwrap_or(self.hidden / self.heads.max(1)),
            kv_heads: self.kv_heads.unwrap_or(self.heads),
            intermediate: self.intermediate.unwrap_or((self.hidden * 8).div_ceil(3).next_multiple_of(64)),
            family: match self.family {
                FamilyName::Llama => Family::Llama,
                FamilyName::Mistral => Family::Mistral,
                FamilyName::Qwen2 => Family::Qwen2,
                FamilyName::Qwen3 => Family::Qwen3,
            },
            out: self.out,
            data: self.data,
            fields: self.fields,
            vocab: self.vocab,
            split: self.split,
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            max_positions: self.max_positions,
            rope_theta: self.rope_theta,
            tied: self.tied,
            dtype: self.dtype,
            deviation: self.deviation,
            seed: self.seed,
        }
    }
}

/// Makes the directory and says what it holds.
pub fn init_model(args: Args) -> Result<()> {
    let json = args.json;
    let plan = args.plan();
    let (parameters, bytes) = plan.size().map_err(Error::bad_input)?;
    eprintln!("a model of up to {:.2}M parameters, {:.1} MB of weights", parameters as f64 / 1e6, bytes as f64 / 1e6);
    let made = init(&plan, &Reading::default()).map_err(Error::bad_input)?;
    if json {
        let line = serde_json::json!({"event": "model", "path": plan.out, "parameters": made.parameters,
            "vocab": made.vocab, "weight_bytes": made.bytes});
        print(&format!("{line}\n"));
        return Ok(());
    }
    print(&format!(
        "{}: {:.2}M parameters, {} tokens, {:.1} MB of weights\n",
        plan.out.display(),
        made.parameters as f64 / 1e6,
        made.vocab,
        made.bytes as f64 / 1e6
    ));
    Ok(())
}
