//! Jinja's tests: what stands after `is`, and what select and reject take by name.

use super::operate::contains;
use super::value::Value;
use super::{filters, Arguments, Fault};
use std::cmp::Ordering;

pub type Predicate = fn(&Value, &Arguments) -> Result<bool, Fault>;

/// The test of this name.
pub fn find(name: &str) -> Option<Predicate> {
    fn order(value: &Value, arguments: &Arguments, fits: fn(Ordering) -> bool) -> Result<bool, Fault> {
        Ok(value.compare(arguments.at(0)?)?.is_some_and(fits))
    }
    fn rest(value: &Value, by: i128) -> Result<i128, Fault> {
        match (value, value.as_int()) {
            (Value::Undefined(what), _) => Err(Fault::undefined(what)),
            (_, Some(_)) if by == 0 => Err(Fault::new("division by zero")),
            (_, Some(n)) => Ok(n.rem_euclid(by)),
            _ => Err(Fault::new(format!("a {} is no whole number", value.kind()))),
        }
    }
    fn cased(value: &Value, up: bool) -> bool {
        let text = super::text::string(value);
        let (some, none): (fn(char) -> bool, fn(char) -> bool) =
            if up { (char::is_uppercase, char::is_lowercase) } else { (char::is_lowercase, char::is_uppercase) };
        text.chars().any(some) && !text.chars().any(none)
    }
    Some(match name {
        "defined" => |v, _| Ok(!v.is_undefined()),
        "undefined" => |v, _| Ok(v.is_undefined()),
        "none" => |v, _| Ok(matches!(v, Value::None)),
        "true" => |v, _| Ok(matches!(v, Value::Bool(true))),
        "false" => |v, _| Ok(matches!(v, Value::Bool(false))),
        "boolean" => |v, _| Ok(matches!(v, Value::Bool(_))),
        "integer" => |v, _| Ok(matches!(v, Value::Int(_))),
        "float" => |v, _| Ok(matches!(v, Value::Float(_))),
        "number" => |v, _| Ok(v.as_float().is_some()),
        "string" => |v, _| Ok(matches!(v, Value::Str(_))),
        "mapping" => |v, _| Ok(matches!(v, Value::Dict(_))),
        "iterable" => |v, _| {
            let no = matches!(v, Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Function(_));
            Ok(!no)
        },
        "sequence" => |v, _| {
            let yes = matches!(
                v,
                Value::Undefined(_)
                    | Value::Str(_)
                    | Value::List(_)
                    | Value::Tuple(_)
                    | Value::Dict(_)
                    | Value::Range(_)
            );
            Ok(yes)
        },
        "callable" => |v, _| {
            let yes = matches!(
                v,
                Value::Undefined(_)
                    | Value::Function(_)
                    | Value::Method(_)
                    | Value::Macro(_)
                    | Value::Loop(_)
                    | Value::Joiner(_)
            );
            Ok(yes)
        },
        "lower" => |v, _| Ok(cased(v, false)),
        "upper" => |v, _| Ok(cased(v, true)),
        "odd" => |v, _| Ok(rest(v, 2)? == 1),
        "even" => |v, _| Ok(rest(v, 2)? == 0),
        "divisibleby" => |v, a| Ok(rest(v, a.at(0)?.as_int().unwrap_or(0))? == 0),
        "eq" | "equalto" | "==" => |v, a| Ok(v.equals(a.at(0)?)),
        "ne" | "!=" => |v, a| Ok(!v.equals(a.at(0)?)),
        "lt" | "lessthan" | "<" => |v, a| order(v, a, Ordering::is_lt),
        "le" | "<=" => |v, a| order(v, a, Ordering::is_le),
        "gt" | "greaterthan" | ">" => |v, a| order(v, a, Ordering::is_gt),
        "ge" | ">=" => |v, a| order(v, a, Ordering::is_ge),
        "in" => |v, a| contains(a.at(0)?, v),
        "sameas" => |v, a| {
            let other = a.at(0)?;
            Ok(v.kind() == other.kind() && v.equals(other))
        },
        "filter" => |v, _| Ok(v.as_str().is_some_and(|name| filters::find(name).is_some())),
        "test" => |v, _| Ok(v.as_str().is_some_and(|name| find(name).is_some())),
        "escaped" => |_, _| Ok(false),
        _ => return None,
    })
}
