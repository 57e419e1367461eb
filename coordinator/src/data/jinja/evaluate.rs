//! A template's statements and expressions, evaluated over scopes of variables.

use super::state::{Draw, LoopState, MacroValue};
use super::syntax::{Comparison, Constant, Expr, ForLoop, Stmt, Target};
use super::text::string;
use super::value::{Dict, Value};
use super::{operate, Fault, Limits};
use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::rc::Rc;
use std::sync::Arc;

pub type Scope = Vec<(Arc<str>, Value)>;

/// One rendering.
pub struct Run<'r, 'd> {
    look_up: &'r dyn Fn(&str) -> Option<Value>,
    pub draw: &'d mut Draw,
    pub(super) scopes: Vec<Scope>,
    pub(super) fuel: u64,
    pub(super) depth: usize,
    pub(super) limits: Limits,
    /// The innermost is what is printed to; the others wait for what a block of theirs captures.
    pub(super) out: String,
    printed: usize,
}

impl<'r, 'd> Run<'r, 'd> {
    pub fn new(look_up: &'r dyn Fn(&str) -> Option<Value>, draw: &'d mut Draw, limits: Limits) -> Self {
        let (scopes, out) = (vec![Scope::new()], String::new());
        Run { look_up, draw, scopes, fuel: limits.fuel, depth: 0, limits, out, printed: 0 }
    }

    pub fn finish(self) -> String {
        self.out
    }

    /// What may still be spent.
    pub fn fuel(&self) -> u64 {
        self.fuel
    }

    pub fn spend(&mut self, units: u64) -> Result<(), Fault> {
        self.fuel = self.fuel.checked_sub(units).ok_or(Fault::Fuel)?;
        Ok(())
    }

    fn print(&mut self, text: &str) -> Result<(), Fault> {
        self.printed += text.len();
        if self.printed > self.limits.output {
            return Err(Fault::Output);
        }
        self.out += text;
        Ok(())
    }

    pub fn stmts(&mut self, all: &[Stmt]) -> Result<(), Fault> {
        all.iter().try_for_each(|stmt| self.stmt(stmt))
    }

    /// What the statements print, in a scope of their own.
    pub(super) fn captured(&mut self, all: &[Stmt], scope: Scope) -> Result<String, Fault> {
        let outer = std::mem::take(&mut self.out);
        self.scopes.push(scope);
        let done = self.stmts(all);
        self.scopes.pop();
        let inner = std::mem::replace(&mut self.out, outer);
        done.map(|()| inner)
    }

    fn scoped(&mut self, all: &[Stmt], scope: Scope) -> Result<(), Fault> {
        self.scopes.push(scope);
        let done = self.stmts(all);
        self.scopes.pop();
        done
    }

    fn stmt(&mut self, stmt: &Stmt) -> Result<(), Fault> {
        self.spend(1)?;
        match stmt {
            Stmt::Text(text) => self.print(text),
            Stmt::Print(expr) => match self.expr(expr)? {
                Value::Str(text) => self.print(&text),
                other => self.print(&string(&other)),
            },
            Stmt::If(test, yes, no) => match self.expr(test)?.is_true() {
                true => self.stmts(yes),
                false => self.stmts(no),
            },
            Stmt::For(source) => {
                let iter = self.expr(&source.iter)?;
                self.repeat(source, &iter, 0)
            }
            Stmt::Set(target, expr) => {
                let value = self.expr(expr)?;
                self.assign(target, value)
            }
            Stmt::SetBlock(target, filter, body) => {
                let mut value = Value::str(self.captured(body, Scope::new())?);
                if let Some(filter) = filter {
                    value = self.filtered(filter, value)?;
                }
                self.assign(target, value)
            }
            Stmt::FilterBlock(filter, body) => {
                let value = Value::str(self.captured(body, Scope::new())?);
                let value = self.filtered(filter, value)?;
                self.print(&string(&value))
            }
            Stmt::With(assignments, body) => {
                let mut values = Vec::new();
                for (target, expr) in assignments {
                    values.push((target, self.expr(expr)?));
                }
                self.scopes.push(Scope::new());
                let done = values.into_iter().try_for_each(|(target, value)| self.assign(target, value));
                let done = done.and_then(|()| self.stmts(body));
                self.scopes.pop();
                done
            }
            Stmt::Scope(body) => self.scoped(body, Scope::new()),
            Stmt::Macro(source) => {
                let value = MacroValue { source: source.clone(), scopes: self.scopes.len() };
                self.set(&source.name, Value::Macro(Rc::new(value)));
                Ok(())
            }
            Stmt::CallBlock(call, source) => {
                let Expr::Call(callee, arguments) = call else { return Err(Fault::new("no call")) };
                let callee = self.expr(callee)?;
                let mut arguments = self.arguments(arguments)?;
                let caller = MacroValue { source: source.clone(), scopes: self.scopes.len() };
                arguments.named.push(("caller".into(), Value::Macro(Rc::new(caller))));
                let value = self.call(&callee, arguments)?;
                self.print(&string(&value))
            }
            Stmt::Evaluate(expr) => self.expr(expr).map(|_| ()),
        }
    }

    pub(super) fn repeat(&mut self, source: &Arc<ForLoop>, iter: &Value, depth: usize) -> Result<(), Fault> {
        if let Value::None | Value::Int(_) | Value::Float(_) | Value::Bool(_) = iter {
            return Err(Fault::new(format!("a {} cannot be iterated over", iter.kind())));
        }
        let items = iter.items(self.fuel)?;
        self.spend(items.len() as u64)?;
        let (rest, scopes) = (RefCell::new(items.into()), self.scopes.len());
        let (items, at, changed) = (RefCell::default(), Cell::new(0), RefCell::new(None));
        let state = Rc::new(LoopState { items, rest, at, depth, source: source.clone(), scopes, changed });
        let mut at = 0;
        // The filter sees what the body did to the items before.
        while self.pull(&state, at + 1)? {
            state.at.set(at);
            self.scopes.push(vec![("loop".into(), Value::Loop(state.clone()))]);
            let item = state.items.borrow()[at].clone();
            let done = self.assign(&source.target, item).and_then(|()| self.stmts(&source.body));
            self.scopes.pop();
            done?;
            at += 1;
        }
        match at {
            0 => self.scoped(&source.otherwise, Scope::new()),
            _ => Ok(()),
        }
    }

    /// Lets items through the loop's filter until there are `count`; whether there are as many.
    fn pull(&mut self, state: &LoopState, count: usize) -> Result<bool, Fault> {
        while state.items.borrow().len() < count {
            let Some(item) = state.rest.borrow_mut().pop_front() else { return Ok(false) };
            if let Some(filter) = &state.source.filter {
                let hidden = self.scopes.split_off(state.scopes.min(self.scopes.len()));
                let fits = self.fits(&state.source, filter, &item);
                self.scopes.extend(hidden);
                if !fits? {
                    continue;
                }
            }
            state.items.borrow_mut().push(item);
        }
        Ok(true)
    }

    fn fits(&mut self, source: &ForLoop, filter: &Expr, item: &Value) -> Result<bool, Fault> {
        self.scopes.push(Scope::new());
        let fits = self.assign(&source.target, item.clone()).and_then(|()| self.expr(filter));
        self.scopes.pop();
        Ok(fits?.is_true())
    }

    pub(super) fn set(&mut self, name: &Arc<str>, value: Value) {
        let Some(scope) = self.scopes.last_mut() else { return };
        match scope.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => scope.push((name.clone(), value)),
        }
    }

    fn assign(&mut self, target: &Target, value: Value) -> Result<(), Fault> {
        match target {
            Target::Name(name) => self.set(name, value),
            Target::Attribute(of, name) => match self.variable(of) {
                Value::Namespace(dict) => dict.borrow_mut().insert(Value::Str(name.clone()), value),
                _ => return Err(Fault::new(format!("{of}.{name} cannot be set: {of} is no namespace"))),
            },
            Target::Several(targets) => {
                let values = value.items(self.fuel)?;
                if values.len() != targets.len() {
                    let problem = format!("{} values cannot be given to {} names", values.len(), targets.len());
                    return Err(Fault::new(problem));
                }
                targets.iter().zip(values).try_for_each(|(target, value)| self.assign(target, value))?;
            }
        }
        Ok(())
    }

    fn variable(&self, name: &Arc<str>) -> Value {
        for scope in self.scopes.iter().rev() {
            if let Some((_, value)) = scope.iter().find(|(known, _)| known == name) {
                return value.clone();
            }
        }
        if let Some(value) = (self.look_up)(name) {
            return value;
        }
        match &**name {
            "range" => Value::Function("range"),
            "zip" => Value::Function("zip"),
            "dict" => Value::Function("dict"),
            "namespace" => Value::Function("namespace"),
            "cycler" => Value::Function("cycler"),
            "joiner" => Value::Function("joiner"),
            _ => Value::Undefined(format!("'{name}'").into()),
        }
    }

    pub fn expr(&mut self, expr: &Expr) -> Result<Value, Fault> {
        self.spend(1)?;
        Ok(match expr {
            Expr::Constant(constant) => match constant {
                Constant::None => Value::None,
                Constant::Bool(b) => Value::Bool(*b),
                Constant::Int(n) => Value::Int(*n),
                Constant::Float(x) => Value::Float(*x),
                Constant::Str(s) => Value::Str(s.clone()),
            },
            Expr::Variable(name) => self.variable(name),
            Expr::List(items) => Value::list(self.exprs(items)?),
            Expr::Tuple(items) => Value::tuple(self.exprs(items)?),
            Expr::Dict(pairs) => {
                let mut dict = Dict::default();
                for (key, value) in pairs {
                    let (key, value) = (self.expr(key)?, self.expr(value)?);
                    key.check_hash()?;
                    dict.insert(key, value);
                }
                Value::dict(dict)
            }
            Expr::Attribute(of, name) => {
                let of = self.expr(of)?;
                if let Value::Loop(state) = &of {
                    match &**name {
                        "last" | "nextitem" => self.pull(state, state.at.get() + 2)?,
                        "length" | "revindex" | "revindex0" => self.pull(state, usize::MAX)?,
                        _ => true,
                    };
                }
                operate::attribute(&of, name)?
            }
            Expr::Item(of, key) => {
                let (of, key) = (self.expr(of)?, self.expr(key)?);
                operate::item(&of, &key)?
            }
            Expr::Slice(of, bounds) => {
                let of = self.expr(of)?;
                let [start, stop, step] = bounds.as_ref();
                let (start, stop, step) = (self.expr(start)?, self.expr(stop)?, self.expr(step)?);
                let cut = operate::slice(&of, &start, &stop, &step)?;
                self.spend(cut.len()? as u64 / 8)?;
                cut
            }
            Expr::Call(callee, arguments) => {
                let callee = self.expr(callee)?;
                let arguments = self.arguments(arguments)?;
                self.call(&callee, arguments)?
            }
            Expr::Filter(Some(subject), filter, arguments) => {
                let subject = self.expr(subject)?;
                let arguments = self.arguments(arguments)?;
                (filter.0)(self, subject, &arguments)?
            }
            Expr::Filter(None, ..) => return Err(Fault::new("a filter has nothing to filter")),
            Expr::Test(subject, test, arguments) => {
                let subject = self.expr(subject)?;
                let arguments = self.arguments(arguments)?;
                Value::Bool((test.0)(&subject, &arguments)?)
            }
            Expr::Not(inner) => Value::Bool(!self.expr(inner)?.is_true()),
            Expr::Negative(inner) => operate::negate(&self.expr(inner)?)?,
            Expr::And(left, right) => match self.expr(left)? {
                left if left.is_true() => self.expr(right)?,
                left => left,
            },
            Expr::Or(left, right) => match self.expr(left)? {
                left if left.is_true() => left,
                _ => self.expr(right)?,
            },
            Expr::Arithmetic(operator, left, right) => {
                let (left, right) = (self.expr(left)?, self.expr(right)?);
                let value = operate::arithmetic(*operator, &left, &right, self.fuel)?;
                if let Value::Str(_) | Value::List(_) | Value::Tuple(_) = value {
                    self.spend(value.len()? as u64 / 8)?;
                }
                value
            }
            Expr::Concat(left, right) => {
                let (left, right) = (self.expr(left)?, self.expr(right)?);
                let text = string(&left) + &string(&right);
                self.spend(text.len() as u64 / 8)?;
                Value::str(text)
            }
            Expr::Compare(left, all) => {
                let mut left = self.expr(left)?;
                for (how, right) in all {
                    let right = self.expr(right)?;
                    if !compare(*how, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            Expr::If(test, yes, no) => match (self.expr(test)?.is_true(), no) {
                (true, _) => self.expr(yes)?,
                (false, Some(no)) => self.expr(no)?,
                (false, None) => Value::undefined("an if without else"),
            },
        })
    }

    fn exprs(&mut self, all: &[Expr]) -> Result<Vec<Value>, Fault> {
        all.iter().map(|expr| self.expr(expr)).collect()
    }
}

fn compare(how: Comparison, left: &Value, right: &Value) -> Result<bool, Fault> {
    Ok(match how {
        Comparison::Eq => left.equals(right),
        Comparison::Ne => !left.equals(right),
        Comparison::In => operate::contains(right, left)?,
        Comparison::NotIn => !operate::contains(right, left)?,
        Comparison::Lt => left.compare(right)? == Some(Ordering::Less),
        Comparison::Gt => left.compare(right)? == Some(Ordering::Greater),
        Comparison::Le => left.compare(right)?.is_some_and(Ordering::is_le),
        Comparison::Ge => left.compare(right)?.is_some_and(Ordering::is_ge),
    })
}
