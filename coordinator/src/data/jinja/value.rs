//! A value as Python has it: lists and dictionaries are shared and can change, numbers are exact, True equals 1.

use super::state::{Cycler, LoopState, MacroValue};
use super::Fault;
use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

/// Lists within lists that are followed: a list may contain itself.
pub const NESTING: usize = 100;

#[derive(Clone)]
pub enum Value {
    /// Carries what was looked for, for the error that its use is.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    List(Rc<RefCell<Vec<Value>>>),
    Tuple(Rc<[Value]>),
    Dict(Rc<RefCell<Dict>>),
    Range(Range),
    /// What map, select and their like give: can be read once and has no length.
    Iter(Rc<RefCell<VecDeque<Value>>>),
    Namespace(Rc<RefCell<Dict>>),
    Loop(Rc<LoopState>),
    Macro(Rc<MacroValue>),
    /// A global function, by name.
    Function(&'static str),
    /// A method of a value, by name.
    Method(Rc<(Value, Arc<str>)>),
    Cycler(Rc<Cycler>),
    /// Whether it has been used, and what separates.
    Joiner(Rc<(Cell<bool>, Value)>),
}

/// range(start, stop, step).
#[derive(Clone, Copy)]
pub struct Range {
    pub start: i128,
    pub stop: i128,
    pub step: i128,
}

impl Range {
    pub fn len(&self) -> usize {
        let span = if self.step > 0 { self.stop - self.start } else { self.start - self.stop };
        let step = self.step.abs();
        usize::try_from(((span + step - 1) / step).max(0)).unwrap_or(usize::MAX)
    }

    pub fn at(&self, index: usize) -> Value {
        Value::Int(self.start + self.step * index as i128)
    }
}

/// Keys in the order of their insertion. Rows' dictionaries are small, so a search is a walk.
#[derive(Clone, Default)]
pub struct Dict(pub Vec<(Value, Value)>);

impl Dict {
    pub fn get(&self, key: &Value) -> Option<&Value> {
        self.0.iter().find(|(known, _)| known.equals(key)).map(|(_, value)| value)
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(known, _)| matches!(known, Value::Str(s) if **s == *key)).map(|(_, value)| value)
    }

    pub fn insert(&mut self, key: Value, value: Value) {
        match self.0.iter_mut().find(|(known, _)| known.equals(&key)) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }

    pub fn remove(&mut self, key: &Value) -> Option<Value> {
        let at = self.0.iter().position(|(known, _)| known.equals(key))?;
        Some(self.0.remove(at).1)
    }
}

impl Value {
    pub fn str(text: impl Into<Arc<str>>) -> Self {
        Value::Str(text.into())
    }

    pub fn list(items: Vec<Value>) -> Self {
        Value::List(Rc::new(RefCell::new(items)))
    }

    pub fn tuple(items: Vec<Value>) -> Self {
        Value::Tuple(items.into())
    }

    pub fn dict(entries: Dict) -> Self {
        Value::Dict(Rc::new(RefCell::new(entries)))
    }

    pub fn iter(items: impl IntoIterator<Item = Value>) -> Self {
        Value::Iter(Rc::new(RefCell::new(items.into_iter().collect())))
    }

    pub fn undefined(what: &str) -> Self {
        Value::Undefined(what.into())
    }

    /// A row's JSON as Python reads it.
    pub fn from_json(value: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        match value {
            Json::Null => Value::None,
            Json::Bool(b) => Value::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Value::Int(n.into()),
                (None, Some(n)) => Value::Int(n.into()),
                (None, None) => Value::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(s) => Value::str(s.as_str()),
            Json::Array(list) => Value::list(list.iter().map(Value::from_json).collect()),
            Json::Object(map) => {
                Value::dict(Dict(map.iter().map(|(k, v)| (Value::str(k.as_str()), Value::from_json(v))).collect()))
            }
        }
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, Value::Undefined(_))
    }

    /// Python's name of the type.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "Undefined",
            Value::None => "NoneType",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::List(_) => "list",
            Value::Tuple(_) => "tuple",
            Value::Dict(_) => "dict",
            Value::Range(_) => "range",
            Value::Iter(_) => "generator",
            Value::Namespace(_) => "Namespace",
            Value::Loop(_) => "LoopContext",
            Value::Macro(_) => "Macro",
            Value::Function(_) | Value::Method(_) => "builtin_function_or_method",
            Value::Cycler(_) => "Cycler",
            Value::Joiner(_) => "Joiner",
        }
    }

    /// bool(value).
    pub fn is_true(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(b) => *b,
            Value::Int(n) => *n != 0,
            Value::Float(x) => *x != 0.0,
            Value::Str(s) => !s.is_empty(),
            Value::List(list) => !list.borrow().is_empty(),
            Value::Tuple(items) => !items.is_empty(),
            Value::Dict(dict) => !dict.borrow().0.is_empty(),
            Value::Range(range) => range.len() > 0,
            _ => true,
        }
    }

    /// A whole number, True and False among them.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Value::Int(n) => Some(*n),
            Value::Bool(b) => Some(i128::from(*b)),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(*x),
            other => other.as_int().map(|n| n as f64),
        }
    }

    pub fn as_str(&self) -> Option<&Arc<str>> {
        match self {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// len(value).
    pub fn len(&self) -> Result<usize, Fault> {
        Ok(match self {
            Value::Undefined(_) => 0,
            Value::Str(s) => s.chars().count(),
            Value::List(list) => list.borrow().len(),
            Value::Tuple(items) => items.len(),
            Value::Dict(dict) => dict.borrow().0.len(),
            Value::Range(range) => range.len(),
            other => return Err(Fault::new(format!("a {} has no length", other.kind()))),
        })
    }

    /// Refuses what Python cannot find by its hash: a list, a dictionary.
    pub fn check_hash(&self) -> Result<(), Fault> {
        match self {
            Value::List(_) | Value::Dict(_) => Err(Fault::new(format!("a {} has no hash", self.kind()))),
            Value::Tuple(items) => items.iter().try_for_each(Value::check_hash),
            _ => Ok(()),
        }
    }

    /// list(value). `limit` bounds what a range may become.
    pub fn items(&self, limit: u64) -> Result<Vec<Value>, Fault> {
        Ok(match self {
            Value::Undefined(_) => Vec::new(),
            Value::Str(s) => s.chars().map(|c| Value::str(c.encode_utf8(&mut [0; 4]) as &str)).collect(),
            Value::List(list) => list.borrow().clone(),
            Value::Tuple(items) => items.to_vec(),
            Value::Dict(dict) => dict.borrow().0.iter().map(|(key, _)| key.clone()).collect(),
            Value::Range(range) if range.len() as u64 > limit => return Err(Fault::Fuel),
            Value::Range(range) => (0..range.len()).map(|i| range.at(i)).collect(),
            Value::Iter(items) => items.borrow_mut().drain(..).collect(),
            other => return Err(Fault::new(format!("a {} cannot be iterated over", other.kind()))),
        })
    }

    /// a == b.
    pub fn equals(&self, other: &Value) -> bool {
        self.equals_at(other, 0)
    }

    fn equals_at(&self, other: &Value, depth: usize) -> bool {
        let all = |a: &[Value], b: &[Value]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| depth < NESTING && a.equals_at(b, depth + 1))
        };
        match (self, other) {
            (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
            (Value::Str(a), Value::Str(b)) => a == b,
            (Value::List(a), Value::List(b)) => Rc::ptr_eq(a, b) || all(&a.borrow(), &b.borrow()),
            (Value::Tuple(a), Value::Tuple(b)) => all(a, b),
            (Value::Dict(a), Value::Dict(b)) => {
                let (a, b) = (a.borrow(), b.borrow());
                a.0.len() == b.0.len()
                    && a.0.iter().all(|(key, value)| {
                        depth < NESTING && b.get(key).is_some_and(|found| found.equals_at(value, depth + 1))
                    })
            }
            (Value::Range(a), Value::Range(b)) => {
                a.len() == b.len() && (0..a.len().min(2)).all(|i| a.at(i).equals(&b.at(i)))
            }
            (Value::Iter(a), Value::Iter(b)) => Rc::ptr_eq(a, b),
            (Value::Namespace(a), Value::Namespace(b)) => Rc::ptr_eq(a, b),
            (Value::Function(a), Value::Function(b)) => a == b,
            _ => self.compare_numbers(other) == Some(Ordering::Equal),
        }
    }

    fn compare_numbers(&self, other: &Value) -> Option<Ordering> {
        match (self.as_int(), other.as_int()) {
            (Some(a), Some(b)) => Some(a.cmp(&b)),
            _ => self.as_float()?.partial_cmp(&other.as_float()?),
        }
    }

    /// Which of the two is smaller; a fault where Python has no order. NaN is unlike anything.
    pub fn compare(&self, other: &Value) -> Result<Option<Ordering>, Fault> {
        for side in [self, other] {
            if let Value::Undefined(what) = side {
                return Err(Fault::undefined(what));
            }
        }
        let lists = |a: &[Value], b: &[Value]| {
            for (a, b) in a.iter().zip(b) {
                if !a.equals(b) {
                    return a.compare(b);
                }
            }
            Ok(Some(a.len().cmp(&b.len())))
        };
        match (self, other) {
            (Value::Str(a), Value::Str(b)) => Ok(Some(a.cmp(b))),
            (Value::List(a), Value::List(b)) => lists(&a.borrow(), &b.borrow()),
            (Value::Tuple(a), Value::Tuple(b)) => lists(a, b),
            _ if self.as_float().is_some() && other.as_float().is_some() => Ok(self.compare_numbers(other)),
            _ => Err(Fault::new(format!("a {} and a {} have no order", self.kind(), other.kind()))),
        }
    }
}
