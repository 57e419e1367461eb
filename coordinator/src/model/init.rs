//! A new model directory: random weights, and a tokenizer trained on a corpus. transformers opens it.

use super::vocabulary::{self, Split, END, PAD};
use super::weights::{self, Dtype};
use super::Error;
use crate::data::Progress;
use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;
use unisono_configs::model::{Family, Layout, ModelSpec};

/// What to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Directory to create; it may exist if it is empty.
    pub out: PathBuf,
    /// JSONL files to train the tokenizer on.
    pub data: Vec<PathBuf>,
    /// Their fields; empty: all that are strings.
    pub fields: Vec<String>,
    pub family: Family,
    /// Most tokens of the tokenizer; the model has as many rows as the tokenizer really has.
    pub vocab: usize,
    pub split: Split,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub max_positions: usize,
    pub rope_theta: f64,
    pub tied: bool,
    pub dtype: Dtype,
    /// Standard deviation of matrices: transformers' `initializer_range`.
    pub deviation: f64,
    pub seed: u64,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    pub parameters: usize,
    pub vocab: usize,
    /// Size of the weights, bytes.
    pub bytes: u64,
}

/// Makes the directory. The same plan and corpus always make the same bytes.
pub fn init(plan: &Plan, progress: &dyn Progress) -> Result<Made, Error> {
    plan.check()?;
    let refuse = |path: &Path, error: std::io::Error| Error::File {
        path: path.into(),
        problem: format!("cannot be written ({error})"),
    };
    if std::fs::read_dir(&plan.out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::File {
            path: plan.out.clone(),
            problem: "exists and is not empty; choose a new directory".into(),
        });
    }
    plan.size()?;
    let tokenizer = vocabulary::train(&plan.data, &plan.fields, plan.vocab, plan.split, plan.family, progress)?;
    let vocab = tokenizer.get_vocab_size(true);
    let config = plan.config(vocab);
    let spec = ModelSpec::from_json(&config, &plan.out.join("config.json"))?;
    let layout = Layout::new(&spec);
    // Whole or not at all: beside its place until all of it is there.
    let place = std::path::absolute(&plan.out).map_err(|error| refuse(&plan.out, error))?;
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let partial = place.with_file_name(format!(".{name}.partial-{}", std::process::id()));
    std::fs::create_dir_all(&partial).map_err(|error| refuse(&plan.out, error))?;
    let made = fill(plan, &partial, &tokenizer, &config, &layout)
        .and_then(|bytes| std::fs::rename(&partial, &place).map(|()| bytes));
    match made {
        Ok(bytes) => Ok(Made { parameters: layout.parameters(), vocab, bytes }),
        Err(error) => {
            // The first error is the one to tell.
            let _ = std::fs::remove_dir_all(&partial);
            Err(refuse(&plan.out, error))
        }
    }
}

/// Writes the files into `directory`; the size of the weights.
fn fill(plan: &Plan, directory: &Path, tokenizer: &Tokenizer, config: &Value, layout: &Layout) -> std::io::Result<u64> {
    let tokens = tokenizer.to_string(true).expect("a trained tokenizer has a JSON form");
    let pretty = |value: &Value| serde_json::to_string_pretty(value).expect("JSON has a text form");
    for (name, text) in [
        ("tokenizer.json", tokens),
        ("tokenizer_config.json", pretty(&plan.tokenizer_config())),
        ("generation_config.json", pretty(&json!({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}))),
        ("config.json", pretty(config)),
    ] {
        std::fs::write(directory.join(name), text + "\n")?;
    }
    weights::write(&directory.join("model.safetensors"), layout, plan.dtype, plan.deviation, plan.seed)
}

/// Bytes that are free where `place` is to be made, where that can be known.
fn free(place: &Path) -> Option<u64> {
    let place = std::path::absolute(place).ok()?;
    let there = place.ancestors().find(|at| at.is_dir())?;
    let system = rustix::fs::statvfs(there).ok()?;
    Some(system.f_bavail.saturating_mul(system.f_frsize))
}

impl Plan {
    /// The most parameters that the model can have, and the bytes of its weights; refuses what has no room.
    pub fn size(&self) -> Result<(usize, u64), Error> {
        self.check()?;
        let sides = [self.vocab, self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.intermediate];
        // A larger number has no place in any model, and sums of products of these stay exact.
        if let Some(side) = sides.iter().find(|side| **side >= 1 << 24) {
            return Err(Error::Option {
                option: "layers",
                problem: format!("one of the shape's numbers is {side}, more than any model has"),
            });
        }
        let wide = |n: usize| n as u128;
        let attention = 2 * (wide(self.heads) + wide(self.kv_heads)) * wide(self.head_dim) * wide(self.hidden);
        let layer = attention + 3 * wide(self.intermediate) * wide(self.hidden);
        let ends = wide(self.vocab) * wide(self.hidden) * if self.tied { 1 } else { 2 };
        let least = (wide(self.layers) * layer + ends) * wide(self.dtype.bytes());
        let free = free(&self.out);
        if let Some(free) = free.filter(|free| u128::from(*free) < least) {
            return Err(Error::File {
                path: self.out.clone(),
                problem: format!(
                    "the model needs {:.1} GB, and {:.1} GB are free there; make it smaller, or name another place",
                    least as f64 / 1e9,
                    free as f64 / 1e9
                ),
            });
        }
        let spec = ModelSpec::from_json(&self.config(self.vocab), &self.out.join("config.json"))?;
        let parameters = Layout::new(&spec).parameters();
        Ok((parameters, (parameters * self.dtype.bytes()) as u64))
    }

    fn check(&self) -> Result<(), Error> {
        for (option, value) in [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv-heads", self.kv_heads),
            ("intermediate", self.intermediate),
            ("max-positions", self.max_positions),
        ] {
            if value == 0 {
                return Err(Error::Option { option, problem: "is 0 and must be at least 1".into() });
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let problem = format!("is {} and must divide --heads {}", self.kv_heads, self.heads);
            return Err(Error::Option { option: "kv-heads", problem });
        }
        if !(self.deviation > 0.0 && self.deviation.is_finite()) {
            let problem = format!("is {} and must be a number above 0", self.deviation);
            return Err(Error::Option { option: "deviation", problem });
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            let problem = format!("is {} and must be even and above 0; give --head-dim", self.head_dim);
            return Err(Error::Option { option: "head-dim", problem });
        }
        if self.family == Family::Qwen2 && self.head_dim * self.heads != self.hidden {
            let problem = format!("is {} and must be --hidden / --heads in a Qwen2 model", self.head_dim);
            return Err(Error::Option { option: "head-dim", problem });
        }
        Ok(())
    }

    /// config.json with the keys that transformers 4 and 5 both read.
    fn config(&self, vocab: usize) -> Value {
        let (kind, architecture) = match self.family {
            Family::Llama => ("llama", "LlamaForCausalLM"),
            Family::Mistral => ("mistral", "MistralForCausalLM"),
            Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
        };
        let mut config = json!({
            "architectures": [architecture],
            "model_type": kind,
            "vocab_size": vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.deviation,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "use_cache": true,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "torch_dtype": match self.dtype { Dtype::Fp32 => "float32", Dtype::Bf16 => "bfloat16" },
        });
        let more = match self.family {
            Family::Llama => json!({"head_dim": self.head_dim, "attention_bias": false, "mlp_bias": false}),
            Family::Mistral => json!({"head_dim": self.head_dim, "sliding_window": null}),
            Family::Qwen2 => json!({"use_sliding_window": false}),
            Family::Qwen3 => json!({"head_dim": self.head_dim, "attention_bias": false, "use_sliding_window": false}),
        };
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
    }

    fn tokenizer_config(&self) -> Value {
        json!({
            "tokenizer_class": if self.family == Family::Qwen2 { "Qwen2Tokenizer" } else { "PreTrainedTokenizerFast" },
            "bos_token": END,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": self.max_positions,
            "clean_up_tokenization_spaces": false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::TextTokenizer;
    use crate::model::check;

    fn plan(dir: &Path, name: &str) -> Plan {
        let corpus = dir.join("corpus.jsonl");
        let rows: String = (0..300)
            .map(|i| format!("{{\"text\": \"the number {} is not {}\", \"id\": {i}}}\n", i * 37, i * 91))
            .collect();
        std::fs::write(&corpus, rows).unwrap();
        Plan {
            out: dir.join(name),
            data: vec![corpus],
            fields: Vec::new(),
            family: Family::Llama,
            vocab: 300,
            split: Split::Words,
            layers: 2,
            hidden: 16,
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            intermediate: 32,
            max_positions: 64,
            rope_theta: 10_000.0,
            tied: true,
            dtype: Dtype::Fp32,
            deviation: 0.02,
            seed: 7,
        }
    }

    fn bytes(plan: &Plan) -> Vec<Vec<u8>> {
        let names =
            ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "model.safetensors"];
        names.iter().map(|name| std::fs::read(plan.out.join(name)).unwrap()).collect()
    }

    #[test]
    fn the_same_plan_makes_the_same_bytes_on_any_number_of_threads() {
        let dir = tempfile::tempdir().unwrap();
        let on = |threads: usize, name: &str, seed: u64| {
            let plan = Plan { seed, ..plan(dir.path(), name) };
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| init(&plan, &()).unwrap());
            bytes(&plan)
        };
        let one = on(1, "one", 7);
        assert!(one == on(3, "three", 7));
        let other = on(1, "other", 8);
        assert!(one[..4] == other[..4] && one[4] != other[4]);
    }

    #[test]
    fn every_family_passes_the_check() {
        let dir = tempfile::tempdir().unwrap();
        for (index, family) in [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3].into_iter().enumerate() {
            for (tied, dtype) in [(true, Dtype::Fp32), (false, Dtype::Bf16)] {
                let plan = Plan { family, tied, dtype, ..plan(dir.path(), &format!("{index}{tied}")) };
                let made = init(&plan, &()).unwrap();
                let checked = check(&plan.out).unwrap();
                assert_eq!(
                    (checked.parameters, checked.spec.vocab, checked.bytes),
                    (made.parameters, made.vocab, made.bytes)
                );
                assert_eq!((checked.spec.family, checked.spec.tied), (family, tied));
            }
        }
    }

    #[test]
    fn text_survives_the_tokenizer_and_splits_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let text = "the number 12345 ist größer als 9\n🙂 fin";
        for (split, name) in [
            (Split::Words, "words"),
            (Split::Digits, "digits"),
            (Split::Letters, "letters"),
            (Split::Characters, "characters"),
        ] {
            let plan = Plan { split, vocab: 400, ..plan(dir.path(), name) };
            let made = init(&plan, &()).unwrap();
            let tokenizer = TextTokenizer::read(&plan.out, made.vocab).unwrap();
            let ids = tokenizer.encode_completion(text).unwrap();
            assert_eq!(tokenizer.encode_prompt(text).unwrap(), ids);
            assert_eq!(
                (tokenizer.decode(&ids).as_str(), tokenizer.pieces(&ids).concat().as_str(), tokenizer.eos()),
                (text, text, 0)
            );
            let longest = |digits: bool| {
                let pieces = tokenizer.pieces(&ids);
                pieces
                    .iter()
                    .filter(|p| p.bytes().any(|b| b.is_ascii_digit()) == digits)
                    .map(|p| p.chars().count())
                    .max()
            };
            match split {
                Split::Words => assert!(longest(true) > Some(1) && longest(false) > Some(2)),
                Split::Digits | Split::Letters => assert!(longest(true) == Some(1) && longest(false) > Some(2)),
                Split::Characters => assert!(longest(true) == Some(1) && longest(false) == Some(1)),
            }
        }
    }

    #[test]
    fn plans_that_make_no_model_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |change: &dyn Fn(&mut Plan)| {
            let mut plan = plan(dir.path(), "refused");
            change(&mut plan);
            init(&plan, &()).unwrap_err().to_string().replace(&format!("{}/", dir.path().display()), "")
        };
        assert_eq!(
            refused(&|p| p.vocab = 100),
            "--vocab: is 100 and must be at least 258: one token for every byte and two special ones"
        );
        let qwen2 = refused(&|p| (p.family, p.split) = (Family::Qwen2, Split::Characters));
        assert!(qwen2.starts_with("--split: characters cannot be had with --family qwen2"), "{qwen2}");
        assert_eq!(refused(&|p| p.kv_heads = 3), "--kv-heads: is 3 and must divide --heads 4");
        assert_eq!(refused(&|p| p.head_dim = 3), "--head-dim: is 3 and must be even and above 0; give --head-dim");
        assert_eq!(
            refused(&|p| p.fields = vec!["id".into()]),
            "corpus.jsonl:1: has no such string field; the row has \"text\", \"id\"; name one of them with --field"
        );
        std::fs::write(dir.path().join("empty.jsonl"), "\n").unwrap();
        assert_eq!(
            refused(&|p| p.data = vec![dir.path().join("empty.jsonl")]),
            "empty.jsonl: has no rows; write one JSON object per line"
        );
        let large = refused(&|p| (p.hidden, p.layers) = (1 << 20, 1 << 20));
        assert!(large.contains("GB are free there"), "{large}");
        assert!(!dir.path().join("refused").exists(), "nothing is left behind");
        let full = refused(&|p| p.out = dir.path().into());
        assert!(full.ends_with("exists and is not empty; choose a new directory"), "{full}");
    }

    #[test]
    fn weights_are_normal() {
        let dir = tempfile::tempdir().unwrap();
        let plan = Plan { hidden: 64, heads: 4, head_dim: 16, intermediate: 256, ..plan(dir.path(), "normal") };
        init(&plan, &()).unwrap();
        let bytes = std::fs::read(plan.out.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let values = |name: &str| -> Vec<f64> {
            let data = tensors.tensor(name).unwrap().data().to_vec();
            data.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        };
        assert!(values("model.norm.weight").iter().all(|&v| v == 1.0));
        let matrix = values("model.layers.1.mlp.up_proj.weight");
        let n = matrix.len() as f64;
        let moment = |k: i32| matrix.iter().map(|v| (v / plan.deviation).powi(k)).sum::<f64>() / n;
        // Standard errors over 16,384 numbers: 0.008, 0.011, 0.077.
        assert!(moment(1).abs() < 0.03 && (moment(2) - 1.0).abs() < 0.04 && (moment(4) - 3.0).abs() < 0.3);
    }
}
