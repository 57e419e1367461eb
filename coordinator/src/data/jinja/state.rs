//! What a rendering keeps beside its variables: random draws, loops, macros, cyclers.

use super::syntax::{ForLoop, Macro};
use super::value::Value;
use super::Fault;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;

/// Numbers for what a template draws at random: the same for the same key.
pub struct Draw {
    reader: blake3::OutputReader,
}

impl Draw {
    pub fn new(key: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("unisono 1 draws of a template");
        for part in key {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        Draw { reader: hasher.finalize_xof() }
    }

    /// A number below `n`, which is above 0.
    pub fn below(&mut self, n: usize) -> usize {
        let mut bytes = [0; 8];
        self.reader.fill(&mut bytes);
        ((u128::from(u64::from_le_bytes(bytes)) * n as u128) >> 64) as usize
    }
}

/// A macro, and how many scopes it sees.
pub struct MacroValue {
    pub source: Arc<Macro>,
    pub(super) scopes: usize,
}

/// The variable `loop`.
pub struct LoopState {
    /// Those that the filter has let through so far.
    pub(super) items: RefCell<Vec<Value>>,
    pub(super) rest: RefCell<VecDeque<Value>>,
    pub(super) at: Cell<usize>,
    pub(super) depth: usize,
    pub(super) source: Arc<ForLoop>,
    pub(super) scopes: usize,
    pub(super) changed: RefCell<Option<Vec<Value>>>,
}

impl LoopState {
    pub fn attribute(&self, name: &str, this: &Value) -> Result<Value, Fault> {
        let items = self.items.borrow();
        let (at, count) = (self.at.get(), items.len());
        let int = |n: usize| Ok(Value::Int(n as i128));
        let item = |at: Option<usize>, what: &str| {
            Ok(at.and_then(|at| items.get(at)).cloned().unwrap_or_else(|| Value::undefined(what)))
        };
        match name {
            "index" => int(at + 1),
            "index0" => int(at),
            "revindex" => int(count - at),
            "revindex0" => int(count - at - 1),
            "first" => Ok(Value::Bool(at == 0)),
            "last" => Ok(Value::Bool(at + 1 == count)),
            "length" => int(count),
            "depth" => int(self.depth + 1),
            "depth0" => int(self.depth),
            "previtem" => item(at.checked_sub(1), "there is no previous item"),
            "nextitem" => item(Some(at + 1), "there is no next item"),
            "cycle" | "changed" => Ok(Value::Method((this.clone(), name.into()).into())),
            other => Ok(Value::Undefined(format!("'loop' has no '{other}'").into())),
        }
    }
}

/// The value of cycler(...).
pub struct Cycler {
    pub(super) items: Vec<Value>,
    pub(super) at: Cell<usize>,
}

impl Cycler {
    pub fn current(&self) -> Result<Value, Fault> {
        Ok(self.items[self.at.get()].clone())
    }

    pub fn call(&self, name: &str) -> Result<Value, Fault> {
        let now = self.current();
        match name {
            "next" => self.at.set((self.at.get() + 1) % self.items.len()),
            _ => {
                self.at.set(0);
                return Ok(Value::None);
            }
        }
        now
    }
}
