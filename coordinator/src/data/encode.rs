//! A rendered row becomes tokens: ids and mask are born together, and what cannot be trained on is found.

use super::cache::{Entry, Measure};
use super::gate::Gate;
use super::problem::{Problem, Remedy};
use super::render::Rendered;
use super::tokenizer::TextTokenizer;
use super::{Error, Example};
use std::ops::Range;

/// Why a row yields no tokens: because of itself, in words, or because nothing of the kind can.
#[derive(Debug)]
pub enum Stop {
    Row(Problem),
    All(Error),
}

/// Makes tokens of texts: a pure function of the text.
pub struct Encoder {
    pub tokenizer: TextTokenizer,
    pub gate: Gate,
    pub vocab: usize,
    pub max_length: usize,
    /// Positions that the model knows.
    pub positions: usize,
}

impl Encoder {
    /// Rows of the same text have the same tokens wherever this is the same.
    pub fn identity(&self) -> Vec<u8> {
        let lengths = [self.vocab, self.max_length].map(|n| (n as u64).to_le_bytes());
        let positions = (self.positions as u64).to_le_bytes();
        [self.tokenizer.identity().as_slice(), lengths.as_flattened(), &positions].concat()
    }

    pub fn encode(&self, rendered: &Rendered<'_>) -> Result<(Entry, Measure), Stop> {
        let (entry, truncated) = match rendered {
            Rendered::Pair { prompt, completion } => self.pair(prompt, completion)?,
            Rendered::Chat { text, spans, .. } => self.conversation(text, spans)?,
        };
        let unasked = entry.prompt + entry.gaps.iter().map(|gap| gap.end - gap.start).sum::<u32>();
        let tokens = entry.tokens.len() as u32;
        // Nothing precedes the very first token, so the model is never asked for it.
        let targets = tokens - unasked - u32::from(entry.prompt == 0);
        if entry.tokens.len() > self.positions + 1 {
            return Err(Stop::Row(Problem::new(format!(
                "the row has {tokens} tokens, but config.json says max_position_embeddings = {positions}; set train.max_length = {positions}",
                positions = self.positions
            ), Remedy::Said)));
        }
        let Entry { tokens: ids, prompt, gaps } = entry;
        let example = Example { task: 0, row: 0, tokens: ids, prompt, gaps };
        let flaws = self.gate.tokens(&example, truncated).bits();
        let entry = Entry { tokens: example.tokens, prompt, gaps: example.gaps };
        Ok((entry, Measure { tokens, targets, unasked, truncated, flaws }))
    }

    fn pair(&self, prompt: &str, completion: &str) -> Result<(Entry, bool), Stop> {
        let mut tokens = self.tokenizer.encode_prompt(prompt).map_err(Stop::All)?;
        let prompt = tokens.len();
        if prompt >= self.max_length {
            return Err(self.full(prompt));
        }
        tokens.extend(self.tokenizer.encode_completion(completion).map_err(Stop::All)?);
        let eos = self.tokenizer.eos();
        if tokens[prompt..].iter().all(|&id| id == eos) {
            return Err(Stop::Row("the completion has no token but the end of text".into()));
        }
        self.check(&tokens)?;
        if tokens.last() != Some(&eos) {
            tokens.push(eos);
        }
        let truncated = tokens.len() > self.max_length;
        tokens.truncate(self.max_length);
        Ok((Entry { tokens: tokens.into(), prompt: prompt as u32, gaps: Box::default() }, truncated))
    }

    /// A conversation's tokens, as far as the last that the model is asked for.
    fn conversation(&self, text: &str, spans: &[Range<usize>]) -> Result<(Entry, bool), Stop> {
        let (mut tokens, mut asked) = self.tokenizer.encode_spans(text, spans).map_err(Stop::All)?;
        self.check(&tokens)?;
        let length = |asked: &[bool]| asked.iter().rposition(|&a| a).map_or(0, |last| last + 1);
        if length(&asked[1.min(asked.len())..]) == 0 {
            return Err(Stop::Row("the turns to train on have no tokens".into()));
        }
        let whole = length(&asked);
        let prompt = asked.iter().position(|&a| a).unwrap_or(0);
        asked.truncate(whole.min(self.max_length));
        asked.truncate(length(&asked));
        if asked.len() < 2 {
            return Err(self.full(prompt));
        }
        tokens.truncate(asked.len());
        let mut gaps: Vec<Range<u32>> = Vec::new();
        for at in (prompt..asked.len()).filter(|&at| !asked[at]) {
            let at = at as u32;
            match gaps.last_mut() {
                Some(gap) if gap.end == at => gap.end += 1,
                _ => gaps.push(at..at + 1),
            }
        }
        Ok((Entry { tokens: tokens.into(), prompt: prompt as u32, gaps: gaps.into() }, whole > self.max_length))
    }

    fn full(&self, prompt: usize) -> Stop {
        let words = format!(
            "the prompt fills the whole length ({prompt} tokens, train.max_length = {}) and leaves no completion token",
            self.max_length
        );
        Stop::Row(Problem::new(words, Remedy::MaxLength))
    }

    /// A token that the model has no row for.
    fn check(&self, tokens: &[u32]) -> Result<(), Stop> {
        match tokens.iter().find(|&&id| id as usize >= self.vocab) {
            Some(id) => Err(Stop::All(self.tokenizer.beyond(*id, self.vocab))),
            None => Ok(()),
        }
    }
}
