//! Values as JSON, for tojson.

use super::text::{float, string};
use super::value::{Value, NESTING};
use super::Fault;

/// json.dumps(value), as Jinja's tojson calls it: sorted keys, safe within HTML.
pub fn json(value: &Value, indent: Option<usize>) -> Result<String, Fault> {
    let plain = as_json(value, 0)?;
    let text = match indent {
        None => spaced(&plain),
        Some(n) => {
            let indent = " ".repeat(n.min(64));
            let mut out = Vec::new();
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
            serde::Serialize::serialize(&plain, &mut serializer).map_err(|e| Fault::new(e.to_string()))?;
            String::from_utf8_lossy(&out).into_owned()
        }
    };
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '<' | '>' | '&' | '\'' => out += &format!("\\u{:04x}", c as u32),
            c if c.is_ascii() => out.push(c),
            c => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out += &format!("\\u{unit:04x}")),
        }
    }
    Ok(out)
}

/// With Python's ", " and ": ".
fn spaced(value: &serde_json::Value) -> String {
    use serde_json::Value as Json;
    match value {
        Json::Array(list) => format!("[{}]", list.iter().map(spaced).collect::<Vec<_>>().join(", ")),
        Json::Object(map) => {
            let all: Vec<String> =
                map.iter().map(|(k, v)| format!("{}: {}", Json::from(k.as_str()), spaced(v))).collect();
            format!("{{{}}}", all.join(", "))
        }
        Json::Number(n) if n.is_f64() => float(n.as_f64().unwrap_or(f64::NAN)),
        other => other.to_string(),
    }
}

fn as_json(value: &Value, depth: usize) -> Result<serde_json::Value, Fault> {
    use serde_json::Value as Json;
    if depth > NESTING {
        return Err(Fault::new("a list contains itself"));
    }
    let all = |items: &[Value]| items.iter().map(|v| as_json(v, depth + 1)).collect::<Result<Vec<_>, _>>();
    Ok(match value {
        Value::None => Json::Null,
        Value::Bool(b) => Json::from(*b),
        Value::Int(n) => match i64::try_from(*n) {
            Ok(n) => Json::from(n),
            Err(_) => Json::from(*n as f64),
        },
        Value::Float(x) => Json::from(*x),
        Value::Str(s) => Json::from(&**s),
        Value::List(list) => Json::from(all(&list.borrow())?),
        Value::Tuple(items) => Json::from(all(items)?),
        Value::Dict(dict) => {
            let dict = dict.borrow();
            let mut entries: Vec<(String, Json)> = Vec::new();
            for (key, value) in &dict.0 {
                let key = match key {
                    Value::None => "null".into(),
                    Value::Bool(b) => b.to_string(),
                    other => string(other),
                };
                entries.push((key, as_json(value, depth + 1)?));
            }
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Json::Object(entries.into_iter().collect())
        }
        other => return Err(Fault::new(format!("a {} cannot be written as JSON", other.kind()))),
    })
}
