//! Jinja's filters of lists, and promptsource's choice and most_frequent.

use super::evaluate::Run;
use super::filters::{self, Filter};
use super::predicates::{self, Predicate};
use super::text::string;
use super::value::Value;
use super::{operate, Arguments, Fault};
use std::cmp::Ordering;
use std::sync::Arc;

/// The filter of this name.
pub fn find(name: &str) -> Option<Filter> {
    Some(match name {
        "batch" => |run, v, a| {
            let size = a.get(0, "linecount").and_then(Value::as_int).unwrap_or(1).max(1) as usize;
            let items = list(run, &v)?;
            let fill = a.get(1, "fill_with").filter(|v| !matches!(v, Value::None));
            let rows = items.chunks(size).map(|chunk| {
                let missing = fill.map_or(0, |_| (size - chunk.len()).min(1 << 16));
                Value::list(chunk.iter().chain(std::iter::repeat_n(fill, missing).flatten()).cloned().collect())
            });
            Ok(Value::iter(rows.collect::<Vec<_>>()))
        },
        "choice" => |run, v, _| {
            let items = sequence(run, &v)?;
            match items.len() {
                0 => Err(Fault::new("choice has nothing to choose from")),
                n => Ok(items[run.draw.below(n)].clone()),
            }
        },
        "count" | "length" => |_, v, _| Ok(Value::Int(v.len()? as i128)),
        "dictsort" => |run, v, a| {
            let Value::Dict(dict) = &v else { return Err(Fault::new("dictsort needs a dict")) };
            let by = usize::from(a.get(1, "by").is_some_and(|by| string(by) == "value"));
            let (exact, reverse) = (flag(a, 0, "case_sensitive"), flag(a, 2, "reverse"));
            let pairs: Vec<Value> =
                dict.borrow().0.iter().map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()])).collect();
            run.spend(pairs.len() as u64)?;
            let key = |pair: &Value| Ok(folded(operate::item(pair, &Value::Int(by as i128))?, exact));
            let keyed = pairs.into_iter().map(|pair| Ok((key(&pair)?, pair))).collect::<Result<_, Fault>>()?;
            Ok(Value::list(sort(keyed, reverse)?))
        },
        "first" => |run, v, _| {
            Ok(match &v {
                Value::Iter(items) => items.borrow_mut().pop_front(),
                Value::List(items) => items.borrow().first().cloned(),
                _ => list(run, &v)?.first().cloned(),
            }
            .unwrap_or_else(|| Value::undefined("the first item of an empty list")))
        },
        "groupby" => |run, v, a| {
            let exact = flag(a, 2, "case_sensitive");
            let path = a.get(0, "attribute").cloned().unwrap_or(Value::None);
            let default = a.get(1, "default").cloned();
            let mut keyed = Vec::new();
            for item in list(run, &v)? {
                let found = get(&item, &path)?;
                let found = if found.is_undefined() { default.clone().unwrap_or(found) } else { found };
                keyed.push((folded(found.clone(), exact), Value::tuple(vec![found, item])));
            }
            let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
            for pair in sort(keyed, false)? {
                let (key, item) = (operate::item(&pair, &Value::Int(0))?, operate::item(&pair, &Value::Int(1))?);
                let like = folded(key.clone(), exact);
                match groups.last_mut().filter(|(known, ..)| known.equals(&like)) {
                    Some((_, _, items)) => items.push(item),
                    None => groups.push((like, key, vec![item])),
                }
            }
            Ok(Value::list(
                groups.into_iter().map(|(_, key, items)| Value::tuple(vec![key, Value::list(items)])).collect(),
            ))
        },
        "items" => |_, v, _| match &v {
            Value::Undefined(_) => Ok(Value::iter([])),
            Value::Dict(dict) => {
                let pairs =
                    dict.borrow().0.iter().map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()])).collect::<Vec<_>>();
                Ok(Value::iter(pairs))
            }
            other => Err(Fault::new(format!("items needs a dict, not a {}", other.kind()))),
        },
        "join" => |run, v, a| {
            let separator = a.get(0, "d").map(string).unwrap_or_default();
            let path = a.get(1, "attribute");
            let mut out = String::new();
            for (index, item) in list(run, &v)?.iter().enumerate() {
                if index > 0 {
                    out += &separator;
                }
                out += &match path {
                    Some(path) => string(&get(item, path)?),
                    None => string(item),
                };
                run.spend(1 + separator.len() as u64 / 8)?;
            }
            Ok(Value::str(out))
        },
        "last" => |run, v, _| match &v {
            Value::Iter(_) => Err(Fault::new("a generator has no last item")),
            _ => Ok(list(run, &v)?.pop().unwrap_or_else(|| Value::undefined("the last item of an empty list"))),
        },
        "list" => |run, v, _| Ok(Value::list(list(run, &v)?)),
        "map" => map,
        "max" => |run, v, a| extreme(run, &v, a, Ordering::Greater),
        "min" => |run, v, a| extreme(run, &v, a, Ordering::Less),
        "most_frequent" => |run, v, _| {
            if !v.is_true() {
                return Ok(Value::None);
            }
            let mut counts: Vec<(Value, usize)> = Vec::new();
            for item in list(run, &v)? {
                item.check_hash()?;
                run.spend(counts.len() as u64 / 8)?;
                match counts.iter_mut().find(|(known, _)| known.equals(&item)) {
                    Some((_, count)) => *count += 1,
                    None => counts.push((item, 1)),
                }
            }
            let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
            Ok(Value::list(counts.into_iter().filter(|(_, count)| *count == most).map(|(item, _)| item).collect()))
        },
        "random" => |run, v, _| {
            let items = sequence(run, &v)?;
            Ok(match items.len() {
                0 => Value::undefined("a random item of an empty list"),
                n => items[run.draw.below(n)].clone(),
            })
        },
        "reject" => |run, v, a| select(run, &v, a, false, false),
        "rejectattr" => |run, v, a| select(run, &v, a, false, true),
        "select" => |run, v, a| select(run, &v, a, true, false),
        "selectattr" => |run, v, a| select(run, &v, a, true, true),
        "reverse" => |run, v, _| match &v {
            Value::Str(text) => Ok(Value::str(text.chars().rev().collect::<String>())),
            _ => {
                let mut items = list(run, &v)?;
                items.reverse();
                Ok(Value::iter(items))
            }
        },
        "slice" => |run, v, a| {
            let count = a.get(0, "slices").and_then(Value::as_int).unwrap_or(1).clamp(1, 1 << 16) as usize;
            let items = list(run, &v)?;
            run.spend(count as u64)?;
            let fill = a.get(1, "fill_with").filter(|v| !matches!(v, Value::None));
            let (each, longer) = (items.len() / count, items.len() % count);
            let mut rest = items.into_iter();
            let rows = (0..count).map(|at| {
                let mut row: Vec<Value> = rest.by_ref().take(each + usize::from(at < longer)).collect();
                if at >= longer {
                    row.extend(fill.cloned());
                }
                Value::list(row)
            });
            Ok(Value::iter(rows.collect::<Vec<_>>()))
        },
        "sort" => |run, v, a| {
            let (reverse, exact) = (flag(a, 0, "reverse"), flag(a, 1, "case_sensitive"));
            let path = a.get(2, "attribute").filter(|path| !matches!(path, Value::None));
            let mut keyed = Vec::new();
            for item in list(run, &v)? {
                keyed.push((sort_key(&item, path, exact)?, item));
            }
            run.spend(keyed.len() as u64 * 4)?;
            Ok(Value::list(sort(keyed, reverse)?))
        },
        "sum" => |run, v, a| {
            let path = a.get(0, "attribute").filter(|path| !matches!(path, Value::None));
            let mut sum = a.get(1, "start").cloned().unwrap_or(Value::Int(0));
            for item in list(run, &v)? {
                let item = path.map_or(Ok(item.clone()), |path| get(&item, path))?;
                sum = operate::arithmetic(operate::Operator::Add, &sum, &item, run.fuel())?;
            }
            Ok(sum)
        },
        "unique" => |run, v, a| {
            let exact = flag(a, 0, "case_sensitive");
            let path = a.get(1, "attribute").filter(|path| !matches!(path, Value::None));
            let (mut seen, mut kept): (Vec<Value>, Vec<Value>) = (Vec::new(), Vec::new());
            for item in list(run, &v)? {
                let key = folded(path.map_or(Ok(item.clone()), |path| get(&item, path))?, exact);
                key.check_hash()?;
                run.spend(seen.len() as u64 / 8)?;
                if !seen.iter().any(|known| known.equals(&key)) {
                    seen.push(key);
                    kept.push(item);
                }
            }
            Ok(Value::iter(kept))
        },
        _ => return None,
    })
}

fn flag(arguments: &Arguments, index: usize, name: &str) -> bool {
    arguments.get(index, name).is_some_and(Value::is_true)
}

/// list(value), paid for.
fn list(run: &mut Run<'_, '_>, value: &Value) -> Result<Vec<Value>, Fault> {
    let items = value.items(run.fuel())?;
    run.spend(items.len() as u64)?;
    Ok(items)
}

/// What random.choice takes: something with a length and an order.
fn sequence(run: &mut Run<'_, '_>, value: &Value) -> Result<Vec<Value>, Fault> {
    match value {
        Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Range(_) => list(run, value),
        Value::Undefined(what) => Err(Fault::undefined(what)),
        other => Err(Fault::new(format!("nothing can be chosen from a {}", other.kind()))),
    }
}

/// Follows a path of names and indices: "answers.0.text".
fn get(item: &Value, path: &Value) -> Result<Value, Fault> {
    let Value::Str(path) = path else { return operate::item(item, path) };
    let mut value = item.clone();
    for part in path.split('.') {
        let key = match part.parse::<u32>() {
            Ok(index) => Value::Int(index.into()),
            Err(_) => Value::str(part),
        };
        value = operate::item(&value, &key)?;
    }
    Ok(value)
}

/// Strings are compared without their case unless `exact`.
fn folded(value: Value, exact: bool) -> Value {
    match &value {
        Value::Str(text) if !exact => Value::str(text.to_lowercase()),
        _ => value,
    }
}

fn sort_key(item: &Value, path: Option<&Value>, exact: bool) -> Result<Value, Fault> {
    match path {
        None => Ok(folded(item.clone(), exact)),
        Some(Value::Str(paths)) => {
            let one = |path: &str| Ok(folded(get(item, &Value::str(path))?, exact));
            Ok(Value::list(paths.split(',').map(one).collect::<Result<_, Fault>>()?))
        }
        Some(path) => Ok(folded(get(item, path)?, exact)),
    }
}

/// Stable, by the keys. A merge of our own: the library's may panic where values (NaN) have no total order.
pub fn sort(mut keyed: Vec<(Value, Value)>, reverse: bool) -> Result<Vec<Value>, Fault> {
    let mut width = 1;
    while width < keyed.len() {
        let mut merged = Vec::with_capacity(keyed.len());
        for run in keyed.chunks(2 * width) {
            let (mut left, mut right) = run.split_at(width.min(run.len()));
            while let ([a, ..], [b, ..]) = (left, right) {
                let (low, high) = if reverse { (&a.0, &b.0) } else { (&b.0, &a.0) };
                let taken = if low.compare(high)? == Some(Ordering::Less) { &mut right } else { &mut left };
                merged.push(taken[0].clone());
                *taken = &taken[1..];
            }
            merged.extend_from_slice(left);
            merged.extend_from_slice(right);
        }
        keyed = merged;
        width *= 2;
    }
    Ok(keyed.into_iter().map(|(_, item)| item).collect())
}

fn extreme(run: &mut Run<'_, '_>, value: &Value, arguments: &Arguments, wanted: Ordering) -> Result<Value, Fault> {
    let exact = flag(arguments, 0, "case_sensitive");
    let path = arguments.get(1, "attribute").filter(|path| !matches!(path, Value::None));
    let mut best: Option<(Value, Value)> = None;
    for item in list(run, value)? {
        let key = folded(path.map_or(Ok(item.clone()), |path| get(&item, path))?, exact);
        let better = match &best {
            None => true,
            Some((known, _)) => key.compare(known)? == Some(wanted),
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(best.map_or_else(|| Value::undefined("the extreme of an empty list"), |(_, item)| item))
}

fn map(run: &mut Run<'_, '_>, value: Value, arguments: &Arguments) -> Result<Value, Fault> {
    let mut out = Vec::new();
    match arguments.named("attribute") {
        Some(path) => {
            let default = arguments.named("default");
            for item in list(run, &value)? {
                let found = get(&item, path)?;
                out.push(if found.is_undefined() { default.cloned().unwrap_or(found) } else { found });
            }
        }
        None => {
            let name = string(arguments.at(0)?);
            let filter =
                filters::find(&name).ok_or_else(|| Fault::new(format!("the filter \"{name}\" does not exist here")))?;
            let rest = Arguments { given: arguments.given[1..].to_vec(), named: arguments.named.clone() };
            for item in list(run, &value)? {
                out.push(filter(run, item, &rest)?);
            }
        }
    }
    Ok(Value::iter(out))
}

fn select(
    run: &mut Run<'_, '_>,
    value: &Value,
    arguments: &Arguments,
    wanted: bool,
    attribute: bool,
) -> Result<Value, Fault> {
    let path = if attribute { Some(arguments.at(0)?) } else { None };
    let mut rest = arguments.given.iter().skip(usize::from(attribute));
    let test: Option<Predicate> = match rest.next() {
        None => None,
        Some(name) => {
            let name: Arc<str> = string(name).into();
            Some(
                predicates::find(&name)
                    .ok_or_else(|| Fault::new(format!("the test \"{name}\" does not exist here")))?,
            )
        }
    };
    let rest = Arguments { given: rest.cloned().collect(), named: arguments.named.clone() };
    let mut kept = Vec::new();
    for item in list(run, value)? {
        let subject = path.map_or(Ok(item.clone()), |path| get(&item, path))?;
        let fits = match test {
            Some(test) => test(&subject, &rest)?,
            None => subject.is_true(),
        };
        if fits == wanted {
            kept.push(item);
        }
    }
    Ok(Value::iter(kept))
}
