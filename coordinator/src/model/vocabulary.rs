//! A byte-level BPE tokenizer, trained on the strings of a corpus.

use super::Error;
use crate::data::{strings, Progress};
use std::path::PathBuf;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::models::TrainerWrapper;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split as SplitAt, SplitPattern};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};
use unisono_configs::model::Family;

/// Ends a text; id 0.
pub(super) const END: &str = "<|endoftext|>";
/// Pads a batch for programs that need it; id 1.
pub(super) const PAD: &str = "<|pad|>";
/// Every byte, and the two above.
const LEAST: usize = 258;

/// How transformers splits the text of every Qwen2 model, whatever its tokenizer.json says.
/// Source: transformers `tokenization_qwen2.PRETOKENIZE_REGEX`.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `Split::Letters`.
const LETTERS: &str = r" ?\p{Lu}?\p{Ll}+|\p{L}|\p{N}|\s|[^\s\p{L}\p{N}]";

/// What no token of a trained tokenizer may join.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Split {
    /// Words, as GPT-2 splits them.
    #[default]
    Words,
    /// Words, and each digit by itself.
    Digits,
    /// Lower-case words with the blank before them; capitals inside words, digits and marks by themselves. Good where
    /// letters and digits are to be counted, copied or turned round.
    Letters,
    /// Every character by itself.
    Characters,
}

/// Trains on the string fields of the JSONL `files`, or only on those named in `fields`. The result has at most `vocab`
/// tokens: fewer where the corpus has no more pairs to join.
pub(super) fn train(
    files: &[PathBuf],
    fields: &[String],
    vocab: usize,
    split: Split,
    family: Family,
    progress: &dyn Progress,
) -> Result<Tokenizer, Error> {
    if vocab < LEAST {
        let problem = format!("is {vocab} and must be at least {LEAST}: one token for every byte and two special ones");
        return Err(Error::Option { option: "vocab", problem });
    }
    let corpus = strings(files, fields, progress)?;
    let refuse = |error: tokenizers::Error| Error::Option {
        option: "data",
        problem: format!("no tokenizer can be trained on it ({error})"),
    };
    let bytes = |regex: bool| PreTokenizerWrapper::from(ByteLevel::new(false, true, regex));
    let isolate = |pattern: &str| {
        SplitAt::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false).map_err(refuse)
    };
    let mut tokenizer = Tokenizer::new(BPE::default());
    let parts: Vec<PreTokenizerWrapper> = match split {
        Split::Characters | Split::Letters if family == Family::Qwen2 => {
            let name = if split == Split::Letters { "letters" } else { "characters" };
            let problem = format!("{name} cannot be had with --family qwen2, whose words transformers splits by a rule of its own; choose another family");
            return Err(Error::Option { option: "split", problem });
        }
        // Qwen2's rule isolates digits.
        Split::Words | Split::Digits if family == Family::Qwen2 => {
            tokenizer.with_normalizer(Some(NFC));
            vec![isolate(QWEN2)?.into(), bytes(false)]
        }
        Split::Words => vec![bytes(true)],
        Split::Digits => vec![Digits::new(true).into(), bytes(true)],
        Split::Letters => vec![isolate(LETTERS)?.into(), bytes(false)],
        Split::Characters => vec![isolate(r"[\s\S]")?.into(), bytes(false)],
    };
    tokenizer.with_pre_tokenizer(Some(Sequence::new(parts)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let special = |text: &str| AddedToken::from(text, true);
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab)
        .show_progress(false)
        .special_tokens(vec![special(END), special(PAD)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), corpus.iter()).map_err(refuse)?;
    Ok(tokenizer)
}
