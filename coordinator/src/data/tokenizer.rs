//! Text to token ids and back: a Hugging Face tokenizer.json and the token that ends a text.

use super::Error;
use serde_json::Value;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// A model directory's tokenizer. Cheap to share between threads.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    path: PathBuf,
    eos: u32,
    /// Every token that ends a text or a turn.
    ends: Vec<u32>,
    /// Special tokens that the tokenizer would append to a text: they would stand between prompt and completion.
    appended: usize,
    /// Hash of tokenizer.json and the end of text.
    identity: [u8; 32],
}

impl TextTokenizer {
    /// Reads `dir/tokenizer.json` and finds the end-of-text token. `vocab` is the model's `vocab_size`.
    pub fn read(dir: &Path, vocab: usize) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let refuse = |problem: String| Error::Tokenizer { path: path.clone(), problem };
        let bytes = std::fs::read(&path).map_err(|error| {
            refuse(format!(
                "cannot be read ({error}); save it with AutoTokenizer.from_pretrained(...).save_pretrained(\"{}\")",
                dir.display()
            ))
        })?;
        let mut identity = blake3::Hasher::new_derive_key("unisono 1 tokenizer");
        identity.update(&bytes);
        // What does not read would be taken for a file that says nothing, and copied into the export.
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            json(dir, name)?;
        }
        let mut tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|error| refuse(format!("not a tokenizer ({error}); download the model's tokenizer.json again")))?;
        // Both would change lengths behind the back of `max_length`.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| refuse(format!("truncation cannot be switched off ({error})")))?;
        let base = tokenizer.get_vocab_size(false);
        if base > vocab {
            return Err(refuse(format!(
                "the tokenizer has {base} tokens, but config.json says vocab_size = {vocab}; \
                 the tokenizer belongs to another model: copy both from the same one"
            )));
        }
        let eos = end_of_text(dir, &tokenizer)?;
        if eos as usize >= vocab {
            return Err(refuse(format!(
                "the end-of-text token is {eos}, but config.json says vocab_size = {vocab}; \
                 the tokenizer belongs to another model: copy both from the same one"
            )));
        }
        let ends = ends(dir, eos);
        identity.update(&eos.to_le_bytes());
        for id in &ends {
            identity.update(&id.to_le_bytes());
        }
        let identity = *identity.finalize().as_bytes();
        let mut this = TextTokenizer { tokenizer, path, eos, ends, appended: 0, identity };
        let (bare, special) = (this.encode("a", false)?, this.encode("a", true)?);
        if let Some(begin) = special.windows(bare.len().max(1)).position(|w| w == bare) {
            this.appended = special.len() - begin - bare.len();
        }
        Ok(this)
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        match self.tokenizer.encode_fast(text, special) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => {
                Err(Error::Tokenizer { path: self.path.clone(), problem: format!("cannot encode a text ({error})") })
            }
        }
    }

    /// Tokenizers with the same identity make the same tokens of a text.
    pub fn identity(&self) -> &[u8; 32] {
        &self.identity
    }

    /// With the special tokens that the tokenizer puts in front of a text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = self.encode(text, true)?;
        ids.truncate(ids.len() - self.appended.min(ids.len()));
        Ok(ids)
    }

    /// Without special tokens; the end-of-text token is not appended.
    pub fn encode_completion(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode(text, false)
    }

    /// Without special tokens but those written out; and for each token whether it lies, be it in part, in one of the
    /// byte ranges `spans`.
    pub fn encode_spans(&self, text: &str, spans: &[Range<usize>]) -> Result<(Vec<u32>, Vec<bool>), Error> {
        let encoding = self.tokenizer.encode(text, false).map_err(|error| Error::Tokenizer {
            path: self.path.clone(),
            problem: format!("cannot encode a text ({error})"),
        })?;
        let mut next = 0;
        let asked = encoding.get_offsets().iter().map(|&(begin, end)| {
            while spans.get(next).is_some_and(|span| span.end <= begin) {
                next += 1;
            }
            spans.get(next).is_some_and(|span| begin < span.end && end > span.start)
        });
        let asked = asked.collect();
        Ok((encoding.get_ids().to_vec(), asked))
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// The text of each token, special tokens included. A token that ends inside a character is empty, and the token
    /// that completes the character carries it.
    pub fn pieces(&self, ids: &[u32]) -> Vec<String> {
        let mut stream = self.tokenizer.decode_stream(false);
        ids.iter().map(|&id| stream.step(id).ok().flatten().unwrap_or_default()).collect()
    }

    /// Refuses a token that the model has no row for.
    pub fn beyond(&self, id: u32, vocab: usize) -> Error {
        let count = self.tokenizer.get_vocab_size(true);
        Error::Tokenizer {
            path: self.path.clone(),
            problem: format!(
                "token {id} occurs in the data, but config.json says vocab_size = {vocab} (the tokenizer has {count} \
                 tokens); the tokenizer belongs to another model: copy both from the same one"
            ),
        }
    }

    /// The token that ends a text.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Every token that ends a text or a turn: generation stops there.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The token that the tokenizer puts in front of a text.
    pub fn begin(&self) -> Option<u32> {
        self.encode_prompt("").ok()?.first().copied()
    }

    /// The token that stands for what the tokenizer does not know.
    pub fn unknown(&self) -> Option<u32> {
        let model = serde_json::to_value(self.tokenizer.get_model()).unwrap_or_default();
        let id = model["unk_id"].as_u64().map(|id| id as u32);
        id.or_else(|| model["unk_token"].as_str().and_then(|text| self.tokenizer.token_to_id(text)))
    }

    /// The special tokens as they are written, in the order of their ids.
    pub fn specials(&self) -> Vec<String> {
        let mut all: Vec<(u32, String)> = (self.tokenizer.get_added_tokens_decoder().into_iter())
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (id, token.content))
            .collect();
        all.sort_unstable();
        all.into_iter().map(|(_, text)| text).collect()
    }

    /// A token as it is written.
    pub fn piece(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }

    pub fn refuse(&self, problem: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), problem }
    }
}

/// `eos` and all that generation_config.json and config.json list beside it.
fn ends(dir: &Path, eos: u32) -> Vec<u32> {
    let mut all = vec![eos];
    for name in ["generation_config.json", "config.json"] {
        let text = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let listed = value["eos_token_id"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        all.extend(listed.map(|id| id as u32));
    }
    all.sort_unstable();
    all.dedup();
    all
}

/// A JSON file of a model directory; null where there is none.
pub fn json(dir: &Path, name: &str) -> Result<Value, Error> {
    let path = dir.join(name);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Value::Null),
        Err(error) => return Err(Error::Tokenizer { path, problem: format!("cannot be read ({error})") }),
    };
    serde_json::from_slice(&bytes).map_err(|error| Error::Tokenizer {
        path,
        problem: format!("not valid JSON ({error}); download the model's {name} again"),
    })
}

/// The first `eos_token_id` of generation_config.json or config.json, else tokenizer_config.json's `eos_token`.
fn end_of_text(dir: &Path, tokenizer: &Tokenizer) -> Result<u32, Error> {
    for name in ["generation_config.json", "config.json"] {
        let value = json(dir, name)?;
        let id = &value["eos_token_id"];
        if let Some(id) = id.get(0).unwrap_or(id).as_u64() {
            return Ok(id as u32);
        }
    }
    let name = "tokenizer_config.json";
    let value = json(dir, name)?;
    let token = &value["eos_token"];
    let token = token.get("content").unwrap_or(token).as_str();
    match token.map(|t| (t, tokenizer.token_to_id(t))) {
        Some((_, Some(id))) => Ok(id),
        Some((token, None)) => Err(Error::Tokenizer {
            path: dir.join(name),
            problem: format!("eos_token \"{token}\" is not in tokenizer.json; copy both from the same model"),
        }),
        None => Err(Error::Tokenizer {
            path: dir.join("config.json"),
            problem: "no end-of-text token is known; set \"eos_token_id\" in config.json, or \"eos_token\" in tokenizer_config.json".into(),
        }),
    }
}
