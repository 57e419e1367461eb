//! Operators, subscripts and slices, with Python's rules.

use super::methods;
use super::text::{percent, string};
use super::value::{Range, Value};
use super::Fault;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Rem,
    Pow,
}

fn too_large() -> Fault {
    Fault::new("a number is too large")
}

/// left operator right. `budget` is how many items or characters may come out of it.
pub fn arithmetic(operator: Operator, left: &Value, right: &Value, budget: u64) -> Result<Value, Fault> {
    use Operator::*;
    for side in [left, right] {
        if let (Value::Undefined(what), false) = (side, operator == Rem && matches!(left, Value::Str(_))) {
            return Err(Fault::undefined(what));
        }
    }
    match (operator, left, right) {
        (Add, Value::Str(a), Value::Str(b)) => return Ok(Value::str(format!("{a}{b}"))),
        (Add, Value::List(a), Value::List(b)) => {
            let (a, b) = (a.borrow(), b.borrow());
            return Ok(Value::list(a.iter().chain(b.iter()).cloned().collect()));
        }
        (Add, Value::Tuple(a), Value::Tuple(b)) => {
            return Ok(Value::tuple(a.iter().chain(b.iter()).cloned().collect()))
        }
        (Rem, Value::Str(format), values) => return Ok(Value::str(percent(format, values)?)),
        (Mul, items @ (Value::Str(_) | Value::List(_) | Value::Tuple(_)), times)
        | (Mul, times, items @ (Value::Str(_) | Value::List(_) | Value::Tuple(_)))
            if times.as_int().is_some() =>
        {
            return repeat(items, times.as_int().unwrap_or(0), budget);
        }
        _ => (),
    }
    let refuse = || {
        let sign = ["+", "-", "*", "/", "//", "%", "**"][operator as usize];
        Fault::new(format!("a {} {sign} a {} is not possible", left.kind(), right.kind()))
    };
    let zero = || Fault::new("division by zero");
    if let (Some(a), Some(b), false) = (left.as_int(), right.as_int(), operator == Div) {
        return Ok(Value::Int(match operator {
            Add => a.checked_add(b).ok_or_else(too_large)?,
            Sub => a.checked_sub(b).ok_or_else(too_large)?,
            Mul => a.checked_mul(b).ok_or_else(too_large)?,
            FloorDiv if b == 0 => return Err(zero()),
            FloorDiv => a.checked_div(b).ok_or_else(too_large)? - i128::from(a % b != 0 && (a < 0) != (b < 0)),
            Rem if b == 0 => return Err(zero()),
            Rem => {
                let rest = a.checked_rem(b).ok_or_else(too_large)?;
                if rest != 0 && (rest < 0) != (b < 0) {
                    rest + b
                } else {
                    rest
                }
            }
            _ => match u32::try_from(b) {
                Ok(power) => a.checked_pow(power).ok_or_else(too_large)?,
                Err(_) if b < 0 => return Ok(Value::Float((a as f64).powf(b as f64))),
                Err(_) => return Err(too_large()),
            },
        }));
    }
    let (a, b) = (left.as_float().ok_or_else(refuse)?, right.as_float().ok_or_else(refuse)?);
    Ok(Value::Float(match operator {
        Add => a + b,
        Sub => a - b,
        Mul => a * b,
        Pow => a.powf(b),
        _ if b == 0.0 => return Err(zero()),
        Div => a / b,
        FloorDiv => ((a - modulo(a, b)) / b).round(),
        Rem => modulo(a, b),
    }))
}

/// Takes the sign of the divisor.
fn modulo(a: f64, b: f64) -> f64 {
    let rest = a % b;
    if rest != 0.0 && (rest < 0.0) != (b < 0.0) {
        rest + b
    } else {
        rest
    }
}

fn repeat(items: &Value, times: i128, budget: u64) -> Result<Value, Fault> {
    let times = usize::try_from(times.max(0)).map_err(|_| Fault::Fuel)?;
    let size = match items {
        Value::Str(s) => s.len(),
        other => other.len()?,
    };
    if size.saturating_mul(times) as u64 > budget {
        return Err(Fault::Fuel);
    }
    let all = |items: &[Value]| (0..times).flat_map(|_| items.iter().cloned()).collect::<Vec<_>>();
    Ok(match items {
        Value::Str(s) => Value::str(s.repeat(times)),
        Value::Tuple(items) => Value::tuple(all(items)),
        Value::List(items) => Value::list(all(&items.borrow())),
        other => other.clone(),
    })
}

pub fn negate(value: &Value) -> Result<Value, Fault> {
    match value {
        Value::Undefined(what) => Err(Fault::undefined(what)),
        Value::Float(x) => Ok(Value::Float(-x)),
        other => match other.as_int() {
            Some(n) => Ok(Value::Int(n.checked_neg().ok_or_else(too_large)?)),
            None => Err(Fault::new(format!("a {} cannot be negated", other.kind()))),
        },
    }
}

/// needle in hay.
pub fn contains(hay: &Value, needle: &Value) -> Result<bool, Fault> {
    Ok(match hay {
        Value::Str(hay) => match needle {
            Value::Str(needle) => hay.contains(&**needle),
            other => return Err(Fault::new(format!("a {} cannot be looked for in a string", other.kind()))),
        },
        Value::Dict(dict) => dict.borrow().get(needle).is_some(),
        Value::List(items) => items.borrow().iter().any(|v| v.equals(needle)),
        Value::Tuple(items) => items.iter().any(|v| v.equals(needle)),
        Value::Undefined(_) => false,
        Value::Range(range) => match needle.as_int() {
            Some(n) => {
                let inside = if range.step > 0 {
                    (range.start..range.stop).contains(&n)
                } else {
                    n <= range.start && n > range.stop
                };
                inside && (n - range.start) % range.step == 0
            }
            None => false,
        },
        Value::Iter(items) => loop {
            let Some(next) = items.borrow_mut().pop_front() else { break false };
            if next.equals(needle) {
                break true;
            }
        },
        other => return Err(Fault::new(format!("nothing can be in a {}", other.kind()))),
    })
}

/// value.name: an attribute, else an item.
pub fn attribute(value: &Value, name: &Arc<str>) -> Result<Value, Fault> {
    match value {
        Value::Undefined(what) => return Err(Fault::undefined(what)),
        Value::Loop(state) => return state.attribute(name, value),
        Value::Namespace(dict) => {
            return Ok(dict.borrow().get_str(name).cloned().unwrap_or_else(|| missing(value, name)));
        }
        Value::Cycler(cycler) if &**name == "current" => return cycler.current(),
        Value::Cycler(_) if matches!(&**name, "next" | "reset") => {
            return Ok(Value::Method((value.clone(), name.clone()).into()));
        }
        _ => (),
    }
    if methods::has(value, name) {
        return Ok(Value::Method((value.clone(), name.clone()).into()));
    }
    match value {
        Value::Dict(dict) => Ok(dict.borrow().get_str(name).cloned().unwrap_or_else(|| missing(value, name))),
        _ => Ok(missing(value, name)),
    }
}

fn missing(value: &Value, name: &str) -> Value {
    Value::Undefined(format!("'{}' has no '{name}'", value.kind()).into())
}

/// value[key]: an item, else an attribute.
pub fn item(value: &Value, key: &Value) -> Result<Value, Fault> {
    if let Value::Undefined(what) = value {
        return Err(Fault::undefined(what));
    }
    let at = |len: usize| {
        let index = key.as_int()?;
        let index = if index < 0 { index + len as i128 } else { index };
        usize::try_from(index).ok().filter(|index| *index < len)
    };
    let found = match value {
        Value::Dict(dict) => dict.borrow().get(key).cloned(),
        Value::List(items) => {
            let items = items.borrow();
            at(items.len()).map(|index| items[index].clone())
        }
        Value::Tuple(items) => at(items.len()).map(|index| items[index].clone()),
        Value::Range(range) => at(range.len()).map(|index| range.at(index)),
        Value::Str(text) => match key.as_int() {
            Some(_) => at(text.chars().count())
                .and_then(|index| text.chars().nth(index))
                .map(|c| Value::str(c.encode_utf8(&mut [0; 4]) as &str)),
            None => None,
        },
        _ => None,
    };
    match (found, key) {
        (Some(found), _) => Ok(found),
        (None, Value::Str(name)) if !matches!(value, Value::Dict(_)) || methods::has(value, name) => {
            attribute(value, name)
        }
        (None, key) => Ok(missing(value, &string(key))),
    }
}

/// value[start:stop:step].
pub fn slice(value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value, Fault> {
    if let Value::Undefined(what) = value {
        return Err(Fault::undefined(what));
    }
    let bound = |value: &Value| match value {
        Value::None => Ok(None),
        other => other.as_int().map(Some).ok_or_else(|| Fault::new("slice bounds must be whole numbers")),
    };
    let step = bound(step)?.unwrap_or(1);
    if step == 0 {
        return Err(Fault::new("the step of a slice is zero"));
    }
    let len = match value {
        Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Range(_) => value.len()? as i128,
        other => return Err(Fault::new(format!("a {} has no slices", other.kind()))),
    };
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let clamp = |bound: Option<i128>, default: i128| match bound {
        None => default,
        Some(n) if n < 0 => (n + len).max(low),
        Some(n) => n.min(high),
    };
    let (start, stop) = (bound(start)?, bound(stop)?);
    let (start, stop) =
        if step > 0 { (clamp(start, low), clamp(stop, high)) } else { (clamp(start, high), clamp(stop, low)) };
    let range = Range { start, stop, step };
    let indices = (0..range.len()).map(|i| (start + step * i as i128) as usize);
    Ok(match value {
        Value::Str(text) if step == 1 => {
            let text: String = text.chars().skip(start as usize).take(range.len()).collect();
            Value::str(text)
        }
        Value::Str(text) => {
            let chars: Vec<char> = text.chars().collect();
            Value::str(indices.map(|i| chars[i]).collect::<String>())
        }
        Value::List(items) => {
            let items = items.borrow();
            Value::list(indices.map(|i| items[i].clone()).collect())
        }
        Value::Tuple(items) => Value::tuple(indices.map(|i| items[i].clone()).collect()),
        Value::Range(range) => Value::list(indices.map(|i| range.at(i)).collect()),
        other => other.clone(),
    })
}
