//! Values as text: str() and repr(), printf's `%` and str.format.

use super::value::{Value, NESTING};
use super::Fault;
use std::fmt::Write;

/// str(value).
pub fn string(value: &Value) -> String {
    match value {
        Value::Undefined(_) => String::new(),
        Value::Str(s) => s.to_string(),
        other => repr(other),
    }
}

/// repr(value).
pub fn repr(value: &Value) -> String {
    let mut out = String::new();
    put(value, &mut out, 0);
    out
}

fn put(value: &Value, out: &mut String, depth: usize) {
    let mut several = |open: &str, items: &[Value], close: &str| {
        *out += open;
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                *out += ", ";
            }
            match depth < NESTING {
                true => put(item, out, depth + 1),
                false => *out += "...",
            }
        }
        *out += close;
    };
    match value {
        Value::Undefined(_) => *out += "Undefined",
        Value::None => *out += "None",
        Value::Bool(true) => *out += "True",
        Value::Bool(false) => *out += "False",
        Value::Int(n) => *out += &n.to_string(),
        Value::Float(x) => *out += &float(*x),
        Value::Str(s) => quote(s, out),
        Value::List(list) => several("[", &list.borrow(), "]"),
        Value::Tuple(items) if items.len() == 1 => several("(", items, ",)"),
        Value::Tuple(items) => several("(", items, ")"),
        Value::Dict(dict) => {
            out.push('{');
            for (index, (key, value)) in dict.borrow().0.iter().enumerate() {
                if index > 0 {
                    *out += ", ";
                }
                match depth < NESTING {
                    true => {
                        put(key, out, depth + 1);
                        *out += ": ";
                        put(value, out, depth + 1);
                    }
                    false => *out += "...",
                }
            }
            out.push('}');
        }
        Value::Range(range) => {
            let _ = match range.step {
                1 => write!(out, "range({}, {})", range.start, range.stop),
                step => write!(out, "range({}, {}, {step})", range.start, range.stop),
            };
        }
        other => *out += &format!("<{}>", other.kind()),
    }
}

fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => *out += "\\\\",
            '\n' => *out += "\\n",
            '\r' => *out += "\\r",
            '\t' => *out += "\\t",
            c if c == quote => out.extend(['\\', c]),
            c if c == ' ' || (!c.is_control() && !c.is_whitespace() && !invisible(c)) => out.push(c),
            c if (c as u32) < 0x100 => *out += &format!("\\x{:02x}", c as u32),
            c if (c as u32) < 0x10000 => *out += &format!("\\u{:04x}", c as u32),
            c => *out += &format!("\\U{:08x}", c as u32),
        }
    }
    out.push(quote);
}

/// Format characters and private ones, which Python escapes.
fn invisible(c: char) -> bool {
    matches!(c as u32, 0xAD | 0x600..=0x605 | 0x61C | 0x6DD | 0x70F | 0x180E | 0x200B..=0x200F | 0x202A..=0x202E
        | 0x2060..=0x206F | 0xFEFF | 0xFFF9..=0xFFFB | 0xE000..=0xF8FF | 0xE0000..=0x10FFFF)
}

/// The shortest text that reads back, with Python's exponents.
pub fn float(x: f64) -> String {
    let size = x.abs();
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf".into() } else { "-inf".into() };
    }
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        return exponent(&format!("{x:e}"));
    }
    format!("{x:?}")
}

/// 1e5 as Python writes it: 1e+05.
fn exponent(text: &str) -> String {
    let (digits, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// A conversion's flags, as printf and str.format share them.
#[derive(Default, Clone)]
struct Layout {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    zero: bool,
    comma: bool,
    width: usize,
    precision: Option<usize>,
}

/// Widest that a conversion may be.
const WIDEST: usize = 10_000;

impl Layout {
    fn pad(&self, text: String, default: char) -> Result<String, Fault> {
        if self.width > WIDEST || self.precision.is_some_and(|p| p > WIDEST) {
            return Err(Fault::new("a number is printed too wide"));
        }
        let missing = self.width.saturating_sub(text.chars().count());
        let fill = |n: usize, c: char| std::iter::repeat_n(c, n).collect::<String>();
        let c = self.fill.unwrap_or(' ');
        Ok(match self.align.unwrap_or(default) {
            _ if missing == 0 => text,
            '<' => text + &fill(missing, c),
            '^' => fill(missing / 2, c) + &text + &fill(missing - missing / 2, c),
            '=' => {
                let digits = text.find(|c: char| c.is_ascii_alphanumeric()).unwrap_or(0);
                let (sign, digits) = text.split_at(digits);
                format!("{sign}{}{digits}", fill(missing, self.fill.unwrap_or('0')))
            }
            _ => fill(missing, c) + &text,
        })
    }

    fn number(&self, value: &Value, conversion: char) -> Result<String, Fault> {
        if let Value::Undefined(what) = value {
            return Err(Fault::undefined(what));
        }
        let not = || Fault::new(format!("%{conversion} needs a number, not a {}", value.kind()));
        let precision = self.precision.unwrap_or(6).min(WIDEST);
        let text = match conversion {
            'd' | 'i' | 'u' => match value {
                Value::Float(x) if x.is_finite() => (x.trunc() as i128).to_string(),
                other => other.as_int().ok_or_else(not)?.to_string(),
            },
            'x' | 'X' | 'o' | 'b' => {
                let n = value.as_int().ok_or_else(not)?;
                let sign = if n < 0 { "-" } else { "" };
                let n = n.unsigned_abs();
                sign.to_owned()
                    + &match conversion {
                        'x' => format!("{n:x}"),
                        'X' => format!("{n:X}"),
                        'o' => format!("{n:o}"),
                        _ => format!("{n:b}"),
                    }
            }
            _ => {
                let x = value.as_float().ok_or_else(not)?;
                match conversion {
                    _ if !x.is_finite() => float(x),
                    'f' | 'F' => format!("{x:.precision$}"),
                    'e' | 'E' => exponent(&format!("{x:.precision$e}")),
                    '%' => format!("{:.precision$}%", x * 100.0),
                    _ => general(x, precision.max(1)),
                }
            }
        };
        let text = if self.comma { grouped(&text) } else { text };
        let text = match self.sign {
            Some(sign @ ('+' | ' ')) if !text.starts_with('-') => format!("{sign}{text}"),
            _ => text,
        };
        let text = if conversion.is_ascii_uppercase() { text.to_uppercase() } else { text };
        match self.zero && self.align.is_none() {
            true => Layout { fill: Some('0'), align: Some('='), ..self.clone() }.pad(text, '>'),
            false => self.pad(text, '>'),
        }
    }
}

/// %g.
fn general(x: f64, precision: usize) -> String {
    let scientific = format!("{x:.*e}", precision - 1);
    let power: i32 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    let trim = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if power < -4 || power >= precision as i32 {
        let (digits, e) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        return exponent(&format!("{}e{e}", trim(digits)));
    }
    trim(&format!("{x:.*}", (precision as i32 - 1 - power).max(0) as usize))
}

/// 1,234,567
fn grouped(text: &str) -> String {
    let sign = usize::from(text.starts_with('-'));
    let end = text[sign..].find(|c: char| !c.is_ascii_digit()).map_or(text.len(), |at| at + sign);
    let digits = &text[sign..end];
    let mut out = text[..sign].to_owned();
    for (index, c) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out + &text[end..]
}

/// format % values.
pub fn percent(format: &str, values: &Value) -> Result<String, Fault> {
    let (given, map): (Vec<Value>, Option<&Value>) = match values {
        Value::Tuple(items) => (items.to_vec(), None),
        Value::Dict(_) => (vec![values.clone()], Some(values)),
        one => (vec![one.clone()], None),
    };
    let mut rest = format.chars().peekable();
    let (mut out, mut next, mut named) = (String::new(), given.iter(), false);
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut value = None;
        if rest.peek() == Some(&'(') {
            rest.next();
            let name: String = rest.by_ref().take_while(|c| *c != ')').collect();
            let Some(Value::Dict(dict)) = map else { return Err(Fault::new("the format requires a dict")) };
            let found = dict.borrow().get_str(&name).cloned();
            value = Some(found.ok_or_else(|| Fault::new(format!("the format's \"{name}\" is missing")))?);
            named = true;
        }
        let mut layout = Layout::default();
        while let Some(flag) = rest.next_if(|c| "-+ 0#".contains(*c)) {
            match flag {
                '-' => layout.align = Some('<'),
                '0' => layout.zero = true,
                '#' => (),
                sign => layout.sign = Some(sign),
            }
        }
        layout.width = digits(&mut rest).unwrap_or(0);
        if rest.next_if_eq(&'.').is_some() {
            layout.precision = Some(digits(&mut rest).unwrap_or(0));
        }
        let conversion = rest.next().ok_or_else(|| Fault::new("the format ends within a conversion"))?;
        if conversion == '%' {
            out.push('%');
            continue;
        }
        let value = match value {
            Some(value) => value,
            None => next.next().cloned().ok_or_else(|| Fault::new("not enough values for the format"))?,
        };
        let cut = |text: String| match layout.precision {
            Some(n) => text.chars().take(n).collect(),
            None => text,
        };
        out += &match conversion {
            's' => layout.pad(cut(string(&value)), '>')?,
            'r' | 'a' => layout.pad(cut(repr(&value)), '>')?,
            'c' => layout.pad(string(&value), '>')?,
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                layout.number(&value, conversion)?
            }
            other => return Err(Fault::new(format!("%{other} is no conversion"))),
        };
    }
    if next.next().is_some() && !named && map.is_none() {
        return Err(Fault::new("not all values are used by the format"));
    }
    Ok(out)
}

fn digits(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<usize> {
    let mut text = String::new();
    while let Some(c) = rest.next_if(char::is_ascii_digit) {
        text.push(c);
    }
    text.parse().ok()
}

/// text.format(*given, **named).
pub fn format(text: &str, given: &[Value], named: &[(String, Value)]) -> Result<String, Fault> {
    let (mut out, mut next) = (String::new(), 0);
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '{' if rest.next_if_eq(&'{').is_some() => out.push('{'),
            '}' if rest.next_if_eq(&'}').is_some() => out.push('}'),
            '}' => return Err(Fault::new("a single } stands in a format")),
            '{' => {
                let field: String = rest.by_ref().take_while(|c| *c != '}').collect();
                let (field, spec) = field.split_once(':').unwrap_or((&field, ""));
                let (name, conversion) = field.split_once('!').unwrap_or((field, ""));
                let missing = || Fault::new(format!("the format's {{{name}}} is missing"));
                let value = match name.parse::<usize>() {
                    Ok(index) => given.get(index).cloned(),
                    Err(_) if name.is_empty() => {
                        next += 1;
                        given.get(next - 1).cloned()
                    }
                    Err(_) => named.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()),
                }
                .ok_or_else(missing)?;
                out += &match conversion {
                    "r" => formatted(&Value::str(repr(&value)), spec)?,
                    "s" => formatted(&Value::str(string(&value)), spec)?,
                    _ => formatted(&value, spec)?,
                };
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

/// format(value, spec).
fn formatted(value: &Value, spec: &str) -> Result<String, Fault> {
    let mut layout = Layout::default();
    let chars: Vec<char> = spec.chars().collect();
    let mut at = 0;
    if chars.len() > 1 && "<>^=".contains(chars[1]) {
        (layout.fill, layout.align, at) = (Some(chars[0]), Some(chars[1]), 2);
    } else if chars.first().is_some_and(|c| "<>^=".contains(*c)) {
        (layout.align, at) = (Some(chars[0]), 1);
    }
    let mut rest = spec.chars().skip(at).collect::<String>();
    if let Some(sign) = rest.chars().next().filter(|c| "+- ".contains(*c)) {
        layout.sign = Some(sign);
        rest.remove(0);
    }
    let mut rest = rest.chars().peekable();
    layout.zero = rest.next_if_eq(&'0').is_some();
    layout.width = digits(&mut rest).unwrap_or(0);
    layout.comma = rest.next_if_eq(&',').is_some();
    if rest.next_if_eq(&'.').is_some() {
        layout.precision = digits(&mut rest);
    }
    let kind = rest.next();
    if rest.next().is_some() {
        return Err(Fault::new(format!("\"{spec}\" is no format")));
    }
    match (kind, value) {
        (None, Value::Int(_)) => layout.number(value, 'd'),
        (None, Value::Float(_)) if layout.precision.is_some() => layout.number(value, 'g'),
        (None, Value::Float(x)) => layout.pad(float(*x), '>'),
        (None | Some('s'), other) => {
            let text = string(other);
            let text = layout.precision.map_or(text.clone(), |n| text.chars().take(n).collect());
            layout.pad(text, '<')
        }
        (Some(kind @ ('d' | 'x' | 'X' | 'o' | 'b' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')), _) => {
            layout.number(value, kind)
        }
        (Some(kind), _) => Err(Fault::new(format!("'{kind}' is no format"))),
    }
}
