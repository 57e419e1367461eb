//! Calls: of macros, of methods, of the global functions; and filters over blocks.

use super::evaluate::{Run, Scope};
use super::state::{Cycler, LoopState, MacroValue};
use super::syntax::{Argument, Expr};
use super::text::string;
use super::value::{Dict, Range, Value};
use super::{methods, operate, Arguments, Fault};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

impl Run<'_, '_> {
    pub(super) fn arguments(&mut self, all: &[Argument]) -> Result<Arguments, Fault> {
        let mut found = Arguments::default();
        for argument in all {
            match argument {
                Argument::Given(expr) => found.given.push(self.expr(expr)?),
                Argument::Named(name, expr) => found.named.push((name.to_string(), self.expr(expr)?)),
                Argument::All(expr) => found.given.extend(self.expr(expr)?.items(self.fuel)?),
                Argument::AllNamed(expr) => {
                    let Value::Dict(dict) = self.expr(expr)? else { return Err(Fault::new("** needs a dict")) };
                    found.named.extend(dict.borrow().0.iter().map(|(key, value)| (string(key), value.clone())));
                }
            }
        }
        Ok(found)
    }

    /// A block's filters, one within the other, over what the block printed.
    pub(super) fn filtered(&mut self, expr: &Expr, block: Value) -> Result<Value, Fault> {
        let Expr::Filter(subject, filter, arguments) = expr else { return Err(Fault::new("no filter")) };
        let subject = match subject {
            None => block,
            Some(inner) => self.filtered(inner, block)?,
        };
        let arguments = self.arguments(arguments)?;
        (filter.0)(self, subject, &arguments)
    }

    pub(super) fn call(&mut self, callee: &Value, arguments: Arguments) -> Result<Value, Fault> {
        match callee {
            Value::Undefined(what) => Err(Fault::undefined(what)),
            Value::Function(name) => self.function(name, arguments),
            Value::Method(bound) => match &bound.0 {
                Value::Loop(state) => self.of_loop(state, &bound.1, arguments),
                value => methods::call(self, value, &bound.1, &arguments),
            },
            Value::Macro(value) => self.expand(value, arguments),
            Value::Loop(state) if state.source.recursive => {
                let (source, depth, scopes) = (state.source.clone(), state.depth + 1, state.scopes);
                let iter = arguments.at(0)?.clone();
                self.nested(scopes, |run| {
                    let outer = std::mem::take(&mut run.out);
                    let done = run.repeat(&source, &iter, depth);
                    let inner = std::mem::replace(&mut run.out, outer);
                    done.map(|()| Value::str(inner))
                })
            }
            Value::Joiner(joiner) => match joiner.0.replace(true) {
                true => Ok(joiner.1.clone()),
                false => Ok(Value::str("")),
            },
            other => Err(Fault::new(format!("a {} cannot be called", other.kind()))),
        }
    }

    /// Runs `work` with no more scopes than the first `scopes`.
    fn nested<T>(&mut self, scopes: usize, work: impl FnOnce(&mut Self) -> Result<T, Fault>) -> Result<T, Fault> {
        if self.depth >= self.limits.depth {
            return Err(Fault::Depth);
        }
        self.depth += 1;
        let hidden = self.scopes.split_off(scopes.min(self.scopes.len()));
        let done = work(self);
        self.scopes.extend(hidden);
        self.depth -= 1;
        done
    }

    fn expand(&mut self, value: &MacroValue, arguments: Arguments) -> Result<Value, Fault> {
        let source = value.source.clone();
        let (names, defaults) = (&source.parameters, &source.defaults);
        self.nested(value.scopes, |run| {
            run.scopes.push(Scope::new());
            let without = names.len() - defaults.len().min(names.len());
            let done = (|| {
                for (index, name) in names.iter().enumerate() {
                    let given = arguments.get(index, name).cloned();
                    let value = match given {
                        Some(value) => value,
                        None if index >= without => run.expr(&defaults[index - without])?,
                        None => Value::Undefined(format!("parameter '{name}'").into()),
                    };
                    run.set(name, value);
                }
                let further = arguments.given.iter().skip(names.len()).cloned().collect();
                run.set(&"varargs".into(), Value::tuple(further));
                let mut kwargs = Dict::default();
                for (name, value) in &arguments.named {
                    match name.as_str() {
                        "caller" if !value_is_parameter(names, name) => run.set(&"caller".into(), value.clone()),
                        _ if value_is_parameter(names, name) => (),
                        _ => kwargs.insert(Value::str(name.as_str()), value.clone()),
                    }
                }
                run.set(&"kwargs".into(), Value::dict(kwargs));
                run.captured(&source.body, Scope::new())
            })();
            run.scopes.pop();
            done.map(Value::str)
        })
    }

    fn of_loop(&mut self, state: &LoopState, name: &str, arguments: Arguments) -> Result<Value, Fault> {
        if name == "cycle" {
            let count = arguments.given.len();
            return match count {
                0 => Err(Fault::new("loop.cycle has no items")),
                _ => Ok(arguments.given[state.at.get() % count].clone()),
            };
        }
        let mut last = state.changed.borrow_mut();
        let same = last.as_ref().is_some_and(|last| {
            last.len() == arguments.given.len() && last.iter().zip(&arguments.given).all(|(a, b)| a.equals(b))
        });
        if !same {
            *last = Some(arguments.given);
        }
        Ok(Value::Bool(!same))
    }

    fn function(&mut self, name: &str, arguments: Arguments) -> Result<Value, Fault> {
        match name {
            "range" => {
                let bound = |index: usize| match arguments.given.get(index) {
                    Some(Value::Undefined(what)) => Err(Fault::undefined(what)),
                    Some(value) => match value.as_int().filter(|n| i64::try_from(*n).is_ok()) {
                        Some(n) => Ok(Some(n)),
                        None => Err(Fault::new("range needs whole numbers")),
                    },
                    None => Ok(None),
                };
                let (start, stop, step) = match (bound(0)?, bound(1)?, bound(2)?) {
                    (Some(stop), None, _) => (0, stop, 1),
                    (Some(start), Some(stop), step) => (start, stop, step.unwrap_or(1)),
                    (None, ..) => return Err(Fault::new("range needs a number")),
                };
                match step {
                    0 => Err(Fault::new("the step of a range is zero")),
                    _ => Ok(Value::Range(Range { start, stop, step })),
                }
            }
            "zip" => {
                let mut lists = Vec::new();
                for value in &arguments.given {
                    if value.is_undefined() || matches!(value, Value::None) {
                        lists.push(value.items(0)?.into_iter());
                        continue;
                    }
                    let items = value.items(self.fuel)?;
                    self.spend(items.len() as u64)?;
                    lists.push(items.into_iter());
                }
                let mut rows = Vec::new();
                while !lists.is_empty() {
                    let row: Vec<Value> = lists.iter_mut().map_while(Iterator::next).collect();
                    if row.len() < lists.len() {
                        break;
                    }
                    rows.push(Value::tuple(row));
                }
                Ok(Value::iter(rows))
            }
            "dict" | "namespace" => {
                let dict = Value::dict(Dict::default());
                self.call(&operate::attribute(&dict, &"update".into())?, arguments)?;
                match (name, dict) {
                    ("namespace", Value::Dict(dict)) => Ok(Value::Namespace(dict)),
                    (_, dict) => Ok(dict),
                }
            }
            "cycler" if arguments.given.is_empty() => Err(Fault::new("cycler has no items")),
            "cycler" => Ok(Value::Cycler(Rc::new(Cycler { items: arguments.given, at: Cell::new(0) }))),
            _ => {
                let separator = arguments.get(0, "sep").cloned().unwrap_or_else(|| Value::str(", "));
                Ok(Value::Joiner(Rc::new((Cell::new(false), separator))))
            }
        }
    }
}

fn value_is_parameter(names: &[Arc<str>], name: &str) -> bool {
    names.iter().any(|known| **known == *name)
}
