//! Jinja's filters of single values, and promptsource's own; those of lists are next door.

use super::evaluate::Run;
use super::json::json;
use super::text::{percent, string};
use super::value::Value;
use super::{methods, operate, sequences, Arguments, Fault};

pub type Filter = fn(&mut Run<'_, '_>, Value, &Arguments) -> Result<Value, Fault>;

/// The filter of this name.
pub fn find(name: &str) -> Option<Filter> {
    Some(match name {
        "abs" => |_, v, _| match &v {
            Value::Undefined(what) => Err(Fault::undefined(what)),
            Value::Float(x) => Ok(Value::Float(x.abs())),
            other => match other.as_int() {
                Some(n) => Ok(Value::Int(n.abs())),
                None => Err(Fault::new(format!("abs needs a number, not a {}", v.kind()))),
            },
        },
        "attr" => |_, v, a| match a.at(0)?.as_str() {
            Some(name) if methods::has(&v, name) || !matches!(v, Value::Dict(_)) => operate::attribute(&v, name),
            _ => Ok(Value::undefined("an attribute")),
        },
        "capitalize" => |_, v, _| Ok(Value::str(methods::capitalize(&string(&v)))),
        "center" => |run, v, a| {
            let width = a.get(0, "width").and_then(Value::as_int).unwrap_or(80);
            let arguments = Arguments { given: vec![Value::Int(width)], named: Vec::new() };
            methods::call(run, &Value::str(string(&v)), "center", &arguments)
        },
        "d" | "default" => |_, v, a| {
            let falsy = a.get(1, "boolean").is_some_and(Value::is_true) && !v.is_true();
            Ok(match v.is_undefined() || falsy {
                true => a.get(0, "default_value").cloned().unwrap_or_else(|| Value::str("")),
                false => v,
            })
        },
        "e" | "escape" | "forceescape" => |_, v, _| {
            let mut out = String::new();
            for c in string(&v).chars() {
                match c {
                    '&' => out += "&amp;",
                    '<' => out += "&lt;",
                    '>' => out += "&gt;",
                    '"' => out += "&#34;",
                    '\'' => out += "&#39;",
                    c => out.push(c),
                }
            }
            Ok(Value::str(out))
        },
        "float" => |_, v, a| {
            let default = a.get(0, "default").cloned().unwrap_or(Value::Float(0.0));
            Ok(to_float(&v)?.map_or(default, Value::Float))
        },
        "format" => |_, v, a| {
            let values = match a.named.is_empty() {
                true => Value::tuple(a.given.clone()),
                false => {
                    let pairs = a.named.iter().map(|(name, value)| (Value::str(name.as_str()), value.clone()));
                    Value::dict(super::Dict(pairs.collect()))
                }
            };
            Ok(Value::str(percent(&string(&v), &values)?))
        },
        "indent" => indent,
        "int" => |_, v, a| {
            let base = a.get(1, "base").and_then(Value::as_int).unwrap_or(10);
            let default = a.get(0, "default").cloned().unwrap_or(Value::Int(0));
            Ok(to_int(&v, base)?.map_or(default, Value::Int))
        },
        "lower" => |_, v, _| Ok(Value::str(string(&v).to_lowercase())),
        "upper" => |_, v, _| Ok(Value::str(string(&v).to_uppercase())),
        "title" => |_, v, _| Ok(Value::str(title(&string(&v)))),
        "replace" => |run, v, a| {
            let text = string(&v);
            run.spend(text.len() as u64 / 64)?;
            let (old, new) = (string(a.at(0)?), string(a.at(1)?));
            methods::replace(&text, &old, &new, a.get(2, "count"), run.fuel())
        },
        "round" => round,
        "safe" | "string" => |_, v, _| Ok(Value::str(string(&v))),
        "striptags" => |_, v, _| {
            let (mut out, mut inside) = (String::new(), false);
            for c in string(&v).chars() {
                match c {
                    '<' => inside = true,
                    '>' if inside => inside = false,
                    c if !inside => out.push(c),
                    _ => (),
                }
            }
            Ok(Value::str(out.split_whitespace().collect::<Vec<_>>().join(" ")))
        },
        "tojson" => |_, v, a| {
            let indent = a.get(0, "indent").and_then(Value::as_int).and_then(|n| usize::try_from(n).ok());
            Ok(Value::str(json(&v, indent)?))
        },
        "trim" => |_, v, a| Ok(Value::str(methods::stripped(&string(&v), a.get(0, "chars"), true, true)?)),
        "truncate" => truncate,
        "urlencode" => |_, v, _| {
            let mut out = String::new();
            for byte in string(&v).bytes() {
                match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => out.push(byte.into()),
                    byte => out += &format!("%{byte:02X}"),
                }
            }
            Ok(Value::str(out))
        },
        "wordcount" => |_, v, _| {
            let text = string(&v);
            let words = text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
            Ok(Value::Int(words.count() as i128))
        },
        "highlight" => |_, v, _| match v.as_str() {
            Some(text) => Ok(Value::str(format!("<span style='color: #F08080'>{text}</span>"))),
            None => Err(Fault::new("highlight needs a string")),
        },
        other => return sequences::find(other),
    })
}

/// float(value); nothing where Python raises TypeError or ValueError.
fn to_float(value: &Value) -> Result<Option<f64>, Fault> {
    Ok(match value {
        Value::Undefined(what) => return Err(Fault::undefined(what)),
        Value::Str(text) => parse_float(text),
        other => other.as_float(),
    })
}

fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(methods::is_space);
    let plain = match text.contains('_') {
        true if well_grouped(text) => text.replace('_', ""),
        true => return None,
        false => text.to_owned(),
    };
    let word = plain.trim_start_matches(['+', '-']).to_ascii_lowercase();
    let known = matches!(word.as_str(), "inf" | "infinity" | "nan");
    match known || word.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        true => plain.parse().ok(),
        false => None,
    }
}

/// Underscores only between digits.
fn well_grouped(text: &str) -> bool {
    let bytes = text.as_bytes();
    let digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_alphanumeric);
    (0..bytes.len()).all(|at| bytes[at] != b'_' || (digit(at.checked_sub(1)) && digit(Some(at + 1))))
}

/// int(value), else int(float(value)); nothing where neither is possible.
fn to_int(value: &Value, base: i128) -> Result<Option<i128>, Fault> {
    let truncated = |x: f64| (x.is_finite() && x.abs() < 1e38).then(|| x.trunc() as i128);
    Ok(match value {
        Value::Undefined(what) => return Err(Fault::undefined(what)),
        Value::Float(x) => truncated(*x),
        Value::Str(text) => {
            let text = text.trim_matches(methods::is_space);
            let (sign, digits) = match text.strip_prefix('-') {
                Some(digits) => (-1, digits),
                None => (1, text.strip_prefix('+').unwrap_or(text)),
            };
            let prefix = match base {
                16 => ["0x", "0X"],
                8 => ["0o", "0O"],
                2 => ["0b", "0B"],
                _ => ["", ""],
            };
            let digits = prefix.iter().find_map(|p| digits.strip_prefix(p)).unwrap_or(digits);
            let plain = digits.replace('_', "");
            let whole = match well_grouped(digits) && plain.starts_with(|c: char| c.is_ascii_alphanumeric()) {
                true => i128::from_str_radix(&plain, base.clamp(2, 36) as u32).ok().map(|n| sign * n),
                false => None,
            };
            match whole {
                Some(n) => Some(n),
                None => parse_float(text).and_then(truncated),
            }
        }
        other => other.as_int(),
    })
}

fn round(_: &mut Run<'_, '_>, value: Value, arguments: &Arguments) -> Result<Value, Fault> {
    let precision = arguments.get(0, "precision").and_then(Value::as_int).unwrap_or(0).clamp(-30, 30) as i32;
    let method = arguments.get(1, "method").map(string).unwrap_or_else(|| "common".into());
    if let Value::Undefined(what) = &value {
        return Err(Fault::undefined(what));
    }
    let Some(x) = value.as_float() else {
        return Err(Fault::new(format!("round needs a number, not a {}", value.kind())));
    };
    let scale = 10f64.powi(precision);
    Ok(match method.as_str() {
        "common" => match (value.as_int(), precision) {
            (Some(n), 0..) => Value::Int(n),
            (Some(n), _) => {
                let by = 10i128.pow(precision.unsigned_abs());
                let (down, rest) = (n.div_euclid(by), n.rem_euclid(by));
                let up = rest * 2 > by || (rest * 2 == by && down % 2 != 0);
                Value::Int((down + i128::from(up)) * by)
            }
            (None, _) if !x.is_finite() => Value::Float(x),
            // The decimal text of a float is exact, so its rounding is Python's.
            (None, 0..) => Value::Float(format!("{x:.*}", precision as usize).parse().unwrap_or(x)),
            (None, _) => Value::Float((x * scale).round_ties_even() / scale),
        },
        "ceil" => Value::Float((x * scale).ceil() / scale),
        "floor" => Value::Float((x * scale).floor() / scale),
        _ => return Err(Fault::new("round's method must be common, ceil or floor")),
    })
}

fn title(text: &str) -> String {
    let mut out = String::new();
    let mut first = true;
    for c in text.chars() {
        let cut = matches!(c, '-' | '(' | '{' | '[' | '<') || methods::is_space(c);
        match first {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        first = cut;
    }
    out
}

fn indent(run: &mut Run<'_, '_>, value: Value, arguments: &Arguments) -> Result<Value, Fault> {
    let prefix = match arguments.get(0, "width") {
        Some(Value::Str(text)) => text.to_string(),
        Some(n) => " ".repeat(n.as_int().unwrap_or(4).clamp(0, 1 << 12) as usize),
        None => " ".repeat(4),
    };
    let flag = |index, name| arguments.get(index, name).is_some_and(Value::is_true);
    let (first, blank) = (flag(1, "first"), flag(2, "blank"));
    let text = string(&value);
    let lines: Vec<&str> = text.split('\n').collect();
    run.spend((lines.len() * prefix.len()) as u64 / 8)?;
    let mut out = String::new();
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if (index > 0 || first) && (blank || !line.is_empty() || (index == 0 && first)) {
            out += &prefix;
        }
        out += line;
    }
    Ok(Value::str(out))
}

fn truncate(_: &mut Run<'_, '_>, value: Value, arguments: &Arguments) -> Result<Value, Fault> {
    let number = |index, name, default: usize| {
        let given = arguments.get(index, name).and_then(Value::as_int);
        given.map_or(default, |n| usize::try_from(n.max(0)).unwrap_or(default))
    };
    let (length, leeway) = (number(0, "length", 255), number(3, "leeway", 5));
    let kill = arguments.get(1, "killwords").is_some_and(Value::is_true);
    let end = arguments.get(2, "end").map_or_else(|| "...".into(), string);
    let text = string(&value);
    if text.chars().count() <= length + leeway {
        return Ok(Value::str(text));
    }
    let kept = length.checked_sub(end.chars().count());
    let kept = kept.ok_or_else(|| Fault::new("truncate's length is below that of its end"))?;
    let cut: String = text.chars().take(kept).collect();
    let cut = if kill { cut.as_str() } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before) };
    Ok(Value::str(format!("{cut}{end}")))
}

/// sorted(items): stable; a fault where two have no order.
pub fn sorted(items: Vec<Value>, reverse: bool) -> Result<Vec<Value>, Fault> {
    let keyed = items.into_iter().map(|v| (v.clone(), v)).collect();
    sequences::sort(keyed, reverse)
}
