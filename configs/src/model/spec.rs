//! `config.json` of a Hugging Face model, as transformers 4 and 5 write it, read by an allow-list: a key that changes
//! the mathematics and is not implemented, or that nobody here knows, is refused by name, never ignored.

use super::harmless::{changes_mathematics, is_harmless};

use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Which transformers architecture the directory declares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2 and others of `LlamaForCausalLM`.
    Llama,
    Mistral,
    /// Qwen 2 and 2.5.
    Qwen2,
    Qwen3,
}

/// Rotary position embedding over the whole head (Su et al. 2021), halves rotated as in transformers' `rotate_half`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How the inverse frequencies are changed for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, interpolated between.
    Llama3 {
        factor: f64,
        low_frequency: f64,
        high_frequency: f64,
        original_positions: f64,
    },
}

impl Rope {
    /// Inverse frequency of each pair of a head with `head_dim` elements: `[head_dim / 2]`.
    /// Source: transformers `modeling_rope_utils._compute_llama3_parameters`.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| {
                let plain = self.theta.powf(-((2 * i) as f64) / head_dim as f64);
                match self.scaling {
                    RopeScaling::None => plain,
                    RopeScaling::Linear { factor } => plain / factor,
                    RopeScaling::Llama3 { factor, low_frequency, high_frequency, original_positions } => {
                        let wavelength = 2.0 * std::f64::consts::PI / plain;
                        if wavelength < original_positions / high_frequency {
                            plain
                        } else if wavelength > original_positions / low_frequency {
                            plain / factor
                        } else {
                            let smooth =
                                (original_positions / wavelength - low_frequency) / (high_frequency - low_frequency);
                            (1.0 - smooth) * plain / factor + smooth * plain
                        }
                    }
                }
            })
            .collect()
    }
}

/// Everything about a model that decides its arithmetic.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub family: Family,
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norm_eps: f64,
    pub rope: Rope,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k before rope (Qwen 3).
    pub qk_norm: bool,
    /// Every layer attends to at most this many latest tokens, its own included.
    pub sliding_window: Option<usize>,
    /// The head's matrix is the embedding's.
    pub tied: bool,
    pub max_positions: usize,
}

/// Why a model directory cannot be used. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot be read ({source}); model.path must be a Hugging Face model directory with config.json, *.safetensors and tokenizer.json")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: not valid JSON ({source}); download the model's config.json again")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error(
        "{path}: model_type \"{found}\" is not supported; use a Llama, Mistral, Qwen2, Qwen2.5, Qwen3 or SmolLM2 model"
    )]
    ModelType { path: PathBuf, found: String },
    #[error("{path}: \"{key}\" is {value}, which changes the model's mathematics and is not implemented; use a model without it")]
    Unsupported { path: PathBuf, key: String, value: String },
    #[error("{path}: \"{key}\" is not known to Unisono, so it may change the model's mathematics; if it does not, remove it from a copy of config.json")]
    Unknown { path: PathBuf, key: String },
    #[error("{path}: \"{key}\" {problem}")]
    Field { path: PathBuf, key: String, problem: String },
}

impl ModelSpec {
    /// Reads `dir/config.json`.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let value = serde_json::from_str(&text).map_err(|source| Error::Json { path: path.clone(), source })?;
        Self::from_json(&value, &path)
    }

    /// Reads a parsed `config.json`; `path` only names it in errors.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self, Error> {
        let object = value.as_object().ok_or_else(|| Error::Field {
            path: path.into(),
            key: "config.json".into(),
            problem: "must be a JSON object".into(),
        })?;
        Reader { object, path, read: Default::default() }.spec()
    }
}

struct Reader<'a> {
    object: &'a Map<String, Value>,
    path: &'a Path,
    /// Keys that were looked at; whatever else is present must be harmless.
    read: std::cell::RefCell<std::collections::BTreeSet<String>>,
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.object.get(key).filter(|v| !v.is_null())
    }

    fn field(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::Field { path: self.path.into(), key: key.into(), problem: problem.into() }
    }

    fn unsupported(&self, key: &str, value: &Value) -> Error {
        Error::Unsupported { path: self.path.into(), key: key.into(), value: value.to_string() }
    }

    fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        self.get(key)
            .map(|v| {
                v.as_u64()
                    .filter(|&n| n > 0 && n < 1 << 32)
                    .map(|n| n as usize)
                    .ok_or_else(|| self.field(key, format!("is {v} and must be a positive whole number")))
            })
            .transpose()
    }

    fn need(&self, key: &str) -> Result<usize, Error> {
        self.count(key)?.ok_or_else(|| self.field(key, "is missing; download the model's config.json again"))
    }

    fn real(&self, key: &str, default: f64) -> Result<f64, Error> {
        self.get(key).map_or(Ok(default), |v| {
            v.as_f64()
                .filter(|x| x.is_finite() && *x > 0.0)
                .ok_or_else(|| self.field(key, format!("is {v} and must be a positive number")))
        })
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        self.get(key).map_or(Ok(default), |v| {
            v.as_bool().ok_or_else(|| self.field(key, format!("is {v} and must be true or false")))
        })
    }

    /// The key must be absent, null or one of the `allowed` values.
    fn only(&self, key: &str, allowed: &[Value]) -> Result<(), Error> {
        match self.get(key) {
            Some(v)
                if !allowed.contains(v)
                    && !allowed.iter().any(|a| a.as_f64().is_some() && a.as_f64() == v.as_f64()) =>
            {
                Err(self.unsupported(key, v))
            }
            _ => Ok(()),
        }
    }

    fn spec(&self) -> Result<ModelSpec, Error> {
        let model_type = self.object.get("model_type").and_then(Value::as_str).unwrap_or("");
        let family = match model_type {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            found => return Err(Error::ModelType { path: self.path.into(), found: found.into() }),
        };
        let (hidden, heads) = (self.need("hidden_size")?, self.need("num_attention_heads")?);
        let kv_heads = self.count("num_key_value_heads")?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(
                self.field("num_key_value_heads", format!("is {kv_heads} and must divide num_attention_heads {heads}"))
            );
        }
        let default_dim = if family == Family::Qwen3 { 128 } else { hidden / heads };
        let head_dim = self.count("head_dim")?.unwrap_or(default_dim);
        if head_dim % 2 != 0 {
            return Err(self.field("head_dim", format!("is {head_dim} and must be even")));
        }
        self.only("hidden_act", &["silu".into()])?;
        for dropout in ["attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "mlp_dropout"] {
            self.only(dropout, &[0.into()])?;
        }
        self.only("pretraining_tp", &[1.into()])?;
        self.only("partial_rotary_factor", &[1.into()])?;
        self.only("tf_legacy_loss", &[false.into()])?;
        self.only("pruned_heads", &[Value::Object(Map::new())])?;
        let layers = self.need("num_hidden_layers")?;
        let attention_bias = self.flag("attention_bias", false)?;
        let spec = ModelSpec {
            family,
            vocab: self.need("vocab_size")?,
            hidden,
            intermediate: self.need("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            norm_eps: self.real("rms_norm_eps", 1e-6)?,
            rope: self.rope()?,
            qkv_bias: if family == Family::Qwen2 { true } else { attention_bias },
            o_bias: family != Family::Qwen2 && attention_bias,
            mlp_bias: self.flag("mlp_bias", false)?,
            qk_norm: family == Family::Qwen3,
            sliding_window: self.window(family, layers)?,
            tied: self.flag("tie_word_embeddings", false)?,
            max_positions: self.count("max_position_embeddings")?.unwrap_or(2048),
        };
        let read = self.read.borrow();
        match self.object.iter().find(|(key, value)| !read.contains(*key) && !is_harmless(key, value)) {
            Some((key, value)) if changes_mathematics(key) => Err(self.unsupported(key, value)),
            Some((key, _)) => Err(Error::Unknown { path: self.path.into(), key: key.clone() }),
            None => Ok(spec),
        }
    }

    /// `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4).
    fn rope(&self) -> Result<Rope, Error> {
        let theta = self.real("rope_theta", 10_000.0)?;
        let (key, table) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(v), _) => ("rope_parameters", v),
            (None, Some(v)) => ("rope_scaling", v),
            (None, None) => return Ok(Rope { theta, scaling: RopeScaling::None }),
        };
        let table = table.as_object().ok_or_else(|| self.unsupported(key, table))?;
        let number = |name: &str| -> Result<f64, Error> {
            table
                .get(name)
                .and_then(Value::as_f64)
                .filter(|x| x.is_finite() && *x > 0.0)
                .ok_or_else(|| self.field(&format!("{key}.{name}"), "is missing or not a positive number"))
        };
        let theta = if table.contains_key("rope_theta") { number("rope_theta")? } else { theta };
        let kind = table.get("rope_type").or_else(|| table.get("type")).and_then(Value::as_str).unwrap_or("default");
        let (scaling, known): (_, &[&str]) = match kind {
            "default" => (RopeScaling::None, &[]),
            "linear" => (RopeScaling::Linear { factor: number("factor")? }, &["factor"]),
            "llama3" => (
                RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_frequency: number("low_freq_factor")?,
                    high_frequency: number("high_freq_factor")?,
                    original_positions: number("original_max_position_embeddings")?,
                },
                &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
            ),
            other => return Err(self.unsupported(&format!("{key}.rope_type"), &other.into())),
        };
        let partial_is_whole =
            |name: &str, value: &Value| name == "partial_rotary_factor" && value.as_f64() == Some(1.0);
        for (name, value) in table {
            let plain = ["rope_theta", "rope_type", "type"].contains(&name.as_str());
            if !plain && !known.contains(&name.as_str()) && !value.is_null() && !partial_is_whole(name, value) {
                return Err(self.unsupported(&format!("{key}.{name}"), value));
            }
        }
        Ok(Rope { theta, scaling })
    }

    /// One window for all layers, or none. Windows on some layers only are refused.
    fn window(&self, family: Family, layers: usize) -> Result<Option<usize>, Error> {
        let window = self.count("sliding_window")?;
        let used = match family {
            Family::Mistral => window.is_some(),
            _ => self.flag("use_sliding_window", false)? && window.is_some(),
        };
        let kinds = match self.get("layer_types") {
            None => {
                // Qwen: only layers from max_window_layers on slide.
                let first = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(0) as usize;
                return match (used, family) {
                    (true, Family::Qwen2 | Family::Qwen3) if first >= layers => Ok(None),
                    (true, Family::Qwen2 | Family::Qwen3) if first > 0 => {
                        Err(self.unsupported("max_window_layers", &first.into()))
                    }
                    (true, _) => Ok(window),
                    (false, _) => Ok(None),
                };
            }
            Some(kinds) => kinds,
        };
        let list: Vec<&str> = kinds.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if list.len() != layers {
            return Err(self.field("layer_types", format!("must name each of the {layers} layers")));
        }
        if list.iter().all(|k| *k == "full_attention") {
            Ok(None)
        } else if list.iter().all(|k| *k == "sliding_attention") && used {
            Ok(window)
        } else {
            Err(self.unsupported("layer_types", kinds))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    pub(crate) fn tiny() -> ModelSpec {
        ModelSpec {
            family: Family::Llama,
            vocab: 512,
            hidden: 64,
            intermediate: 128,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            tied: true,
            max_positions: 256,
        }
    }

    fn base() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
            "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "max_position_embeddings": 256,
            "hidden_act": "silu", "attention_dropout": 0.0, "torch_dtype": "float32", "use_cache": true})
    }

    fn read(patch: Value) -> Result<ModelSpec, Error> {
        let mut value = base();
        value.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        ModelSpec::from_json(&value, Path::new("config.json"))
    }

    #[test]
    fn transformers_4_and_5_say_the_same() {
        assert_eq!(read(json!({})).unwrap(), tiny());
        let five = json!({"rope_theta": null, "torch_dtype": null, "dtype": "float32",
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}});
        assert_eq!(read(five).unwrap(), tiny());
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64});
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = 10000.0.into();
        let four = read(json!({"rope_scaling": scaling})).unwrap();
        assert_eq!(four, read(json!({"rope_theta": null, "rope_parameters": parameters})).unwrap());
        assert!(matches!(four.rope.scaling, RopeScaling::Llama3 { .. }));
    }

    #[test]
    fn keys_that_change_the_mathematics_are_refused_by_name() {
        for (key, value) in [
            ("attention_dropout", json!(0.1)),
            ("partial_rotary_factor", json!(0.5)),
            ("attn_logit_softcapping", json!(50.0)),
            ("num_local_experts", json!(8)),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
            ("hidden_act", json!("gelu")),
            ("layer_types", json!(["full_attention", "sliding_attention"])),
        ] {
            let sentence = read(json!({ key: value })).unwrap_err().to_string();
            assert!(sentence.contains(key), "{sentence}");
        }
        assert!(read(json!({"model_type": "gpt2"})).unwrap_err().to_string().contains("gpt2"));
    }

    #[test]
    fn keys_that_change_nothing_are_passed_over_and_unknown_ones_are_named_as_such() {
        let harmless = json!({"_attn_implementation_autoset": true, "attn_implementation": "sdpa", "torchscript": false,
            "use_bfloat16": true, "model_max_length": 2048, "max_length": 20, "do_sample": true, "temperature": 0.6,
            "top_p": 0.9, "top_k": 50, "pad_token": "<pad>", "use_mrope": false, "summary_first_dropout": 0.0,
            "classifier_dropout": null, "use_something_new": 0});
        assert_eq!(read(harmless).unwrap(), tiny());
        let sentence = |patch: Value| read(patch).unwrap_err().to_string();
        let unknown = sentence(json!({"foo_bar": 1}));
        assert!(
            unknown.contains("\"foo_bar\" is not known to Unisono") && unknown.contains("copy of config.json"),
            "{unknown}"
        );
        for patch in [json!({"use_mrope": true}), json!({"new_dropout": 0.1}), json!({"foo_bar": 0})] {
            assert!(sentence(patch).contains("is not known"), "dropout, a switch that is on, and what is no switch");
        }
        assert!(sentence(json!({"final_logit_softcapping": 30.0})).contains("changes the model's mathematics"));
    }

    #[test]
    fn families_differ_where_transformers_does() {
        let qwen2 = read(
            json!({"model_type": "qwen2", "use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 2}),
        )
        .unwrap();
        assert!(qwen2.qkv_bias && !qwen2.o_bias && qwen2.sliding_window.is_none());
        let qwen3 = read(json!({"model_type": "qwen3", "head_dim": 32})).unwrap();
        assert!(qwen3.qk_norm && !qwen3.qkv_bias && qwen3.head_dim == 32);
        let mistral = read(json!({"model_type": "mistral", "sliding_window": 128})).unwrap();
        assert_eq!(mistral.sliding_window, Some(128));
    }
}
