//! Methods of Python's strings, lists and dictionaries.

use super::evaluate::Run;
use super::text::{format, repr, string};
use super::value::{Dict, Value};
use super::{operate, Arguments, Fault};
use std::rc::Rc;

const STR: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];
const LIST: &[&str] =
    &["append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse", "sort"];
const DICT: &[&str] = &["clear", "copy", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"];

/// Whether the value has this method.
pub fn has(value: &Value, name: &str) -> bool {
    match value {
        Value::Str(_) => STR.contains(&name),
        Value::List(_) => LIST.contains(&name),
        Value::Tuple(_) | Value::Range(_) => matches!(name, "count" | "index"),
        Value::Dict(_) => DICT.contains(&name),
        Value::Float(_) => name == "is_integer",
        _ => false,
    }
}

/// Python's str.isspace.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

pub fn capitalize(text: &str) -> String {
    let mut rest = text.chars();
    match rest.next() {
        None => String::new(),
        Some(first) => upper_first(first) + &rest.as_str().to_lowercase(),
    }
}

/// In title case: of a character that two capitals replace, only the first is one.
fn upper_first(c: char) -> String {
    let mut upper = c.to_uppercase();
    let first = upper.next().into_iter();
    first.chain(upper.flat_map(char::to_lowercase)).collect()
}

pub fn title(text: &str) -> String {
    let mut out = String::new();
    let mut within = false;
    for c in text.chars() {
        match within {
            true => out.extend(c.to_lowercase()),
            false => out += &upper_first(c),
        }
        within = c.is_alphabetic();
    }
    out
}

/// value.name(arguments).
pub fn call(run: &mut Run<'_, '_>, value: &Value, name: &str, arguments: &Arguments) -> Result<Value, Fault> {
    match value {
        Value::Str(text) => of_string(run, text, name, arguments),
        Value::List(_) => of_list(run, value, name, arguments),
        Value::Dict(_) => of_dict(value, name, arguments),
        Value::Tuple(_) | Value::Range(_) => {
            let (items, wanted) = (value.items(run.fuel())?, arguments.at(0)?);
            match name {
                "count" => Ok(Value::Int(items.iter().filter(|v| v.equals(wanted)).count() as i128)),
                _ => position(&items, wanted),
            }
        }
        Value::Float(x) => Ok(Value::Bool(x.is_finite() && x.fract() == 0.0)),
        Value::Cycler(cycler) => cycler.call(name),
        other => Err(Fault::new(format!("a {} has no method {name}", other.kind()))),
    }
}

fn position(items: &[Value], wanted: &Value) -> Result<Value, Fault> {
    let at = items.iter().position(|v| v.equals(wanted));
    at.map(|at| Value::Int(at as i128)).ok_or_else(|| Fault::new(format!("{} is not in the list", repr(wanted))))
}

/// The characters that strip takes away.
pub fn stripped<'t>(text: &'t str, set: Option<&Value>, left: bool, right: bool) -> Result<&'t str, Fault> {
    let set: Option<Vec<char>> = match set {
        None | Some(Value::None) => None,
        Some(Value::Str(set)) => Some(set.chars().collect()),
        Some(other) => return Err(Fault::new(format!("strip takes a string, not a {}", other.kind()))),
    };
    let gone = |c: char| set.as_ref().map_or_else(|| is_space(c), |set| set.contains(&c));
    let text = if left { text.trim_start_matches(gone) } else { text };
    Ok(if right { text.trim_end_matches(gone) } else { text })
}

/// A string argument; Python refuses others.
fn text_of<'a>(value: &'a Value, name: &str) -> Result<&'a str, Fault> {
    match value {
        Value::Str(s) => Ok(s),
        Value::Undefined(what) => Err(Fault::undefined(what)),
        other => Err(Fault::new(format!("{name} takes a string, not a {}", other.kind()))),
    }
}

pub fn replace(text: &str, old: &str, new: &str, count: Option<&Value>, budget: u64) -> Result<Value, Fault> {
    let count = match count {
        None | Some(Value::None) => usize::MAX,
        Some(n) => n.as_int().map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX)),
    };
    let times = text.len() / old.len().max(1) + 1;
    if (times.saturating_mul(new.len()) as u64) > budget {
        return Err(Fault::Fuel);
    }
    Ok(Value::str(text.replacen(old, new, count)))
}

fn of_string(run: &mut Run<'_, '_>, text: &str, name: &str, arguments: &Arguments) -> Result<Value, Fault> {
    run.spend(text.len() as u64 / 64)?;
    let test = |all: &dyn Fn(char) -> bool| Value::Bool(!text.is_empty() && text.chars().all(all));
    let cased = |f: &dyn Fn(char) -> bool, other: &dyn Fn(char) -> bool| {
        Value::Bool(text.chars().any(f) && !text.chars().any(other))
    };
    let found = |byte: Option<usize>| byte.map_or(-1, |byte| text[..byte].chars().count() as i128);
    let pad = |left: &dyn Fn(usize) -> usize| -> Result<Value, Fault> {
        let width = arguments.at(0)?.as_int().unwrap_or(0).clamp(0, 1 << 20) as usize;
        let c = match arguments.get(1, "fillchar") {
            Some(c) => text_of(c, name)?.chars().next().unwrap_or(' '),
            None => ' ',
        };
        let missing = width.saturating_sub(text.chars().count());
        let fill = |n: usize| std::iter::repeat_n(c, n).collect::<String>();
        Ok(Value::str(format!("{}{text}{}", fill(left(missing)), fill(missing - left(missing)))))
    };
    Ok(match name {
        "upper" => Value::str(text.to_uppercase()),
        "lower" | "casefold" => Value::str(text.to_lowercase()),
        "capitalize" => Value::str(capitalize(text)),
        "title" => Value::str(title(text)),
        "swapcase" => Value::str(
            text.chars()
                .flat_map(|c| {
                    if c.is_uppercase() {
                        c.to_lowercase().collect::<Vec<_>>()
                    } else {
                        c.to_uppercase().collect()
                    }
                })
                .collect::<String>(),
        ),
        "strip" => Value::str(stripped(text, arguments.get(0, "chars"), true, true)?),
        "lstrip" => Value::str(stripped(text, arguments.get(0, "chars"), true, false)?),
        "rstrip" => Value::str(stripped(text, arguments.get(0, "chars"), false, true)?),
        "split" | "rsplit" => Value::list(split(text, arguments, name == "rsplit")?),
        "splitlines" => {
            let ends = ['\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}'];
            let joined = text.replace("\r\n", "\n");
            let mut parts: Vec<&str> = joined.split(ends).collect();
            if parts.last() == Some(&"") {
                parts.pop();
            }
            Value::list(parts.into_iter().map(Value::str).collect())
        }
        "startswith" | "endswith" => {
            let fits = |part: &Value| -> Result<bool, Fault> {
                let part = text_of(part, name)?;
                Ok(if name == "startswith" { text.starts_with(part) } else { text.ends_with(part) })
            };
            match arguments.at(0)? {
                Value::Tuple(parts) => {
                    let fitting: Result<Vec<bool>, Fault> = parts.iter().map(fits).collect();
                    Value::Bool(fitting?.contains(&true))
                }
                part => Value::Bool(fits(part)?),
            }
        }
        "replace" => {
            let (old, new) = (text_of(arguments.at(0)?, name)?, text_of(arguments.at(1)?, name)?);
            replace(text, old, new, arguments.get(2, "count"), run.fuel())?
        }
        "find" | "index" | "rfind" | "rindex" => {
            let start = arguments.get(1, "start").and_then(Value::as_int).unwrap_or(0);
            let start = if start < 0 { start + text.chars().count() as i128 } else { start }.max(0) as usize;
            let byte = text.char_indices().nth(start).map_or(text.len(), |(byte, _)| byte);
            let part = text_of(arguments.at(0)?, name)?;
            let within = &text[byte..];
            let at = if name.starts_with('r') { within.rfind(part) } else { within.find(part) };
            match found(at.map(|at| at + byte)) {
                -1 if name.ends_with("index") => return Err(Fault::new("substring not found")),
                at => Value::Int(at),
            }
        }
        "count" => {
            let part = text_of(arguments.at(0)?, name)?;
            let n = if part.is_empty() { text.chars().count() + 1 } else { text.matches(part).count() };
            Value::Int(n as i128)
        }
        "join" => {
            let items = arguments.at(0)?.items(run.fuel())?;
            let parts: Result<Vec<&str>, Fault> = items.iter().map(|v| text_of(v, name)).collect();
            let parts = parts?;
            run.spend((parts.len() * (text.len() + 1)) as u64 / 8)?;
            Value::str(parts.join(text))
        }
        "format" => Value::str(format(text, &arguments.given, &arguments.named)?),
        "isalpha" => test(&char::is_alphabetic),
        "isalnum" => test(&char::is_alphanumeric),
        "isdigit" | "isnumeric" => test(&char::is_numeric),
        "isspace" => test(&is_space),
        "isupper" => cased(&char::is_uppercase, &char::is_lowercase),
        "islower" => cased(&char::is_lowercase, &char::is_uppercase),
        "center" => {
            let width = arguments.at(0)?.as_int().unwrap_or(0);
            pad(&|missing| missing / 2 + (missing & width as usize & 1))?
        }
        "ljust" => pad(&|_| 0)?,
        "rjust" => pad(&|missing| missing)?,
        "zfill" => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let width = arguments.at(0)?.as_int().unwrap_or(0).clamp(0, 1 << 20) as usize;
            Value::str(format!("{sign}{}{digits}", "0".repeat(width.saturating_sub(text.chars().count()))))
        }
        "partition" | "rpartition" => {
            let part = text_of(arguments.at(0)?, name)?;
            let cut = if name == "partition" { text.split_once(part) } else { text.rsplit_once(part) };
            let three = match cut {
                Some((before, after)) => [before, part, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::tuple(three.into_iter().map(Value::str).collect())
        }
        "removeprefix" => Value::str(text.strip_prefix(text_of(arguments.at(0)?, name)?).unwrap_or(text)),
        "removesuffix" => Value::str(text.strip_suffix(text_of(arguments.at(0)?, name)?).unwrap_or(text)),
        other => return Err(Fault::new(format!("a str has no method {other}"))),
    })
}

fn split(text: &str, arguments: &Arguments, right: bool) -> Result<Vec<Value>, Fault> {
    let most = match arguments.get(1, "maxsplit").and_then(Value::as_int) {
        Some(n) if n >= 0 => n as usize,
        _ => usize::MAX,
    };
    let parts: Vec<&str> = match arguments.get(0, "sep") {
        None | Some(Value::None) if most == usize::MAX => {
            text.split(is_space).filter(|part| !part.is_empty()).collect()
        }
        None | Some(Value::None) => {
            let (mut parts, mut rest) = (Vec::new(), text.trim_matches(is_space));
            while parts.len() < most {
                let cut = if right { rest.rfind(is_space) } else { rest.find(is_space) };
                let Some(at) = cut else { break };
                let (before, after) = (rest[..at].trim_end_matches(is_space), rest[at..].trim_start_matches(is_space));
                parts.push(if right { after } else { before });
                rest = if right { before } else { after };
            }
            parts.extend((!rest.is_empty()).then_some(rest));
            if right {
                parts.reverse();
            }
            parts
        }
        Some(separator) => match text_of(separator, "split")? {
            "" => return Err(Fault::new("empty separator")),
            separator if right => {
                let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), separator).collect();
                parts.reverse();
                parts
            }
            separator => text.splitn(most.saturating_add(1), separator).collect(),
        },
    };
    Ok(parts.into_iter().map(Value::str).collect())
}

fn of_list(run: &mut Run<'_, '_>, value: &Value, name: &str, arguments: &Arguments) -> Result<Value, Fault> {
    let Value::List(list) = value else { return Err(Fault::new("not a list")) };
    let index = |value: &Value, len: usize| value.as_int().map(|n| if n < 0 { n + len as i128 } else { n });
    let len = list.borrow().len();
    run.spend(1 + if matches!(name, "append" | "pop") { 0 } else { len as u64 / 8 })?;
    match name {
        "append" => list.borrow_mut().push(arguments.at(0)?.clone()),
        "extend" => {
            let more = arguments.at(0)?.items(run.fuel())?;
            run.spend(more.len() as u64)?;
            list.borrow_mut().extend(more);
        }
        "insert" => {
            let at = index(arguments.at(0)?, len).unwrap_or(0).clamp(0, len as i128) as usize;
            list.borrow_mut().insert(at, arguments.at(1)?.clone());
        }
        "pop" => {
            let wanted = arguments.get(0, "index").cloned().unwrap_or(Value::Int(-1));
            let at = index(&wanted, len).filter(|at| (0..len as i128).contains(at));
            let at = at.ok_or_else(|| Fault::new("pop index out of range"))?;
            return Ok(list.borrow_mut().remove(at as usize));
        }
        "remove" => {
            let at = position(&list.borrow(), arguments.at(0)?)?;
            list.borrow_mut().remove(at.as_int().unwrap_or(0) as usize);
        }
        "clear" => list.borrow_mut().clear(),
        "reverse" => list.borrow_mut().reverse(),
        "copy" => return Ok(Value::list(list.borrow().clone())),
        "count" => {
            let wanted = arguments.at(0)?;
            return Ok(Value::Int(list.borrow().iter().filter(|v| v.equals(wanted)).count() as i128));
        }
        "index" => return position(&list.borrow(), arguments.at(0)?),
        "sort" => {
            let reverse = arguments.get(9, "reverse").is_some_and(Value::is_true);
            let sorted = super::filters::sorted(list.borrow().clone(), reverse)?;
            *list.borrow_mut() = sorted;
        }
        other => return Err(Fault::new(format!("a list has no method {other}"))),
    }
    Ok(Value::None)
}

fn of_dict(value: &Value, name: &str, arguments: &Arguments) -> Result<Value, Fault> {
    let Value::Dict(dict) = value else { return Err(Fault::new("not a dict")) };
    let pair = |(key, value): &(Value, Value)| Value::tuple(vec![key.clone(), value.clone()]);
    Ok(match name {
        "get" => match dict.borrow().get(arguments.at(0)?) {
            Some(found) => found.clone(),
            None => arguments.get(1, "default").cloned().unwrap_or(Value::None),
        },
        // Views in Python; templates only read them.
        "items" => Value::list(dict.borrow().0.iter().map(pair).collect()),
        "keys" => Value::list(dict.borrow().0.iter().map(|(key, _)| key.clone()).collect()),
        "values" => Value::list(dict.borrow().0.iter().map(|(_, value)| value.clone()).collect()),
        "update" => {
            let mut more: Vec<(Value, Value)> = match arguments.get(0, "") {
                None => Vec::new(),
                Some(Value::Dict(other)) if Rc::ptr_eq(dict, other) => Vec::new(),
                Some(Value::Dict(other)) => other.borrow().0.clone(),
                Some(other) => {
                    let pairs = other
                        .items(1 << 20)?
                        .into_iter()
                        .map(|pair| Ok((operate::item(&pair, &Value::Int(0))?, operate::item(&pair, &Value::Int(1))?)));
                    pairs.collect::<Result<_, Fault>>()?
                }
            };
            more.extend(arguments.named.iter().map(|(key, value)| (Value::str(key.as_str()), value.clone())));
            let mut dict = dict.borrow_mut();
            more.into_iter().for_each(|(key, value)| dict.insert(key, value));
            Value::None
        }
        "pop" => match (dict.borrow_mut().remove(arguments.at(0)?), arguments.get(1, "default")) {
            (Some(found), _) => found,
            (None, Some(default)) => default.clone(),
            (None, None) => return Err(Fault::new(format!("the dict has no {}", string(arguments.at(0)?)))),
        },
        "popitem" => match dict.borrow_mut().0.pop() {
            Some(last) => pair(&last),
            None => return Err(Fault::new("the dict is empty")),
        },
        "setdefault" => {
            let (key, default) = (arguments.at(0)?, arguments.get(1, "default").cloned().unwrap_or(Value::None));
            let found = dict.borrow().get(key).cloned();
            match found {
                Some(found) => found,
                None => {
                    dict.borrow_mut().insert(key.clone(), default.clone());
                    default
                }
            }
        }
        "copy" => Value::dict(Dict(dict.borrow().0.clone())),
        "clear" => {
            dict.borrow_mut().0.clear();
            Value::None
        }
        other => return Err(Fault::new(format!("a dict has no method {other}"))),
    })
}
