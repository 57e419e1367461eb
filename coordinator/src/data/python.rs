//! Values as Python writes them, where Jinja templates were written for it: str(), json.dumps and strftime.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};

/// Jinja's tests where they see Python's types: a text and a dictionary are sequences, None is nothing to go through, and
/// True is a number.
pub fn add_tests(environment: &mut Environment<'_>) {
    use ValueKind::{Bool, Iterable, Map, Number, Seq, String, Undefined};
    environment.add_test("iterable", |v: &Value| matches!(v.kind(), String | Seq | Map | Iterable | Undefined));
    environment.add_test("sequence", |v: &Value| matches!(v.kind(), String | Seq | Map | Undefined));
    environment.add_test("number", |v: &Value| matches!(v.kind(), Number | Bool));
}

/// str(value); undefined is empty.
pub fn string(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.to_string(),
        _ => repr(value),
    }
}

fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => "None".into(),
        ValueKind::Bool => (if value.is_true() { "True" } else { "False" }).into(),
        ValueKind::Number => number(value),
        ValueKind::String => {
            let text = value.to_string();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            let mut out = String::from(quote);
            for c in text.chars() {
                match c {
                    '\\' => out += "\\\\",
                    '\n' => out += "\\n",
                    '\r' => out += "\\r",
                    '\t' => out += "\\t",
                    c if c == quote => out.extend(['\\', c]),
                    c => out.push(c),
                }
            }
            out.push(quote);
            out
        }
        ValueKind::Map => {
            let all: Vec<String> = entries(value).iter().map(|(k, v)| format!("{}: {}", repr(k), repr(v))).collect();
            format!("{{{}}}", all.join(", "))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let all: Vec<String> = value.try_iter().into_iter().flatten().map(|v| repr(&v)).collect();
            format!("[{}]", all.join(", "))
        }
        _ => value.to_string(),
    }
}

fn entries(map: &Value) -> Vec<(Value, Value)> {
    let keys = map.try_iter().into_iter().flatten();
    keys.map(|key| (key.clone(), map.get_item(&key).unwrap_or_default())).collect()
}

/// A whole number as it is, another as the shortest text that reads back, with Python's exponents.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else { return value.to_string() };
    let size = x.abs();
    if !x.is_finite() {
        return (if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        })
        .into();
    }
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{x:?}")
}

/// How json.dumps lays a value out.
struct Layout {
    indent: Option<String>,
    item: String,
    key: String,
    sort: bool,
    ascii: bool,
}

/// json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False), as transformers' `tojson` calls
/// it.
pub fn to_json(value: &Value, options: &Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (sort, ascii): (Option<bool>, Option<bool>) = (options.get("sort_keys")?, options.get("ensure_ascii")?);
    options.assert_all_used()?;
    let indent = match indent.filter(|i| !i.is_none()) {
        None => None,
        Some(text) if text.kind() == ValueKind::String => Some(text.to_string()),
        Some(n) => Some(" ".repeat(usize::try_from(n).unwrap_or(0).min(64))),
    };
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        None if indent.is_some() => [",".into(), ": ".into()],
        None => [", ".into(), ": ".into()],
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators must be two strings")),
    };
    let layout = Layout { indent, item, key, sort: sort.unwrap_or(false), ascii: ascii.unwrap_or(false) };
    let mut out = String::new();
    layout.put(value, 0, &mut out)?;
    Ok(out)
}

impl Layout {
    fn put(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => *out += "null",
            ValueKind::Bool => *out += if value.is_true() { "true" } else { "false" },
            ValueKind::Number => *out += &number(value),
            ValueKind::String => self.text(&value.to_string(), out),
            ValueKind::Map => {
                let mut all = entries(value);
                if self.sort {
                    all.sort_by_key(|(key, _)| key.to_string());
                }
                self.several(['{', '}'], &all, depth, out, |(key, value), out| {
                    self.text(&key.to_string(), out);
                    *out += &self.key;
                    self.put(value, depth + 1, out)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let all: Vec<Value> = value.try_iter()?.collect();
                self.several(['[', ']'], &all, depth, out, |value, out| self.put(value, depth + 1, out))?;
            }
            kind => {
                let problem = format!("{kind} cannot be written as JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, problem));
            }
        }
        Ok(())
    }

    fn several<T>(
        &self,
        brackets: [char; 2],
        all: &[T],
        depth: usize,
        out: &mut String,
        put: impl Fn(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(brackets[0]);
        let line = |depth: usize, out: &mut String| {
            if let (Some(indent), false) = (&self.indent, all.is_empty()) {
                out.push('\n');
                *out += &indent.repeat(depth);
            }
        };
        for (index, one) in all.iter().enumerate() {
            if index > 0 {
                *out += &self.item;
            }
            line(depth + 1, out);
            put(one, out)?;
        }
        line(depth, out);
        out.push(brackets[1]);
        Ok(())
    }

    fn text(&self, text: &str, out: &mut String) {
        let quoted = serde_json::Value::from(text).to_string();
        for c in quoted.chars() {
            match c.is_ascii() || !self.ascii {
                true => out.push(c),
                false => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| *out += &format!("\\u{unit:04x}")),
            }
        }
    }
}

/// strftime at midnight of a day.
pub fn date((year, month, day): (i32, u32, u32), format: &str) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    let name = MONTHS[month as usize - 1];
    // Sakamoto's rule.
    let shift = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4][month as usize - 1];
    let y = if month < 3 { year - 1 } else { year };
    let weekday = DAYS[((y + y / 4 - y / 100 + y / 400 + shift + day as i32) % 7) as usize];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match rest.next() {
            Some('Y') => out += &format!("{year:04}"),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += name,
            Some('b') => out += &name[..3],
            Some('A') => out += weekday,
            Some('a') => out += &weekday[..3],
            Some('H' | 'M' | 'S') => out += "00",
            Some('%') | None => out.push('%'),
            Some(other) => out.extend(['%', other]),
        }
    }
    out
}
