//! One source row: a JSON object whose strings are borrowed from the line where they can be.

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// A JSON object in the order of its source.
#[derive(Debug, PartialEq)]
pub struct Row<'a> {
    pub fields: Vec<(Cow<'a, str>, Field<'a>)>,
}

#[derive(Debug, PartialEq)]
pub enum Field<'a> {
    Text(Cow<'a, str>),
    Other(Value),
}

impl Field<'_> {
    /// What the field is, in words, with its article.
    pub fn kind(&self) -> &'static str {
        match self {
            Field::Text(_) | Field::Other(Value::String(_)) => "a string",
            Field::Other(Value::Null) => "null",
            Field::Other(Value::Bool(_)) => "true or false",
            Field::Other(Value::Number(_)) => "a number",
            Field::Other(Value::Array(_)) => "a list",
            Field::Other(Value::Object(_)) => "an object",
        }
    }
}

impl<'a> Row<'a> {
    pub fn get(&self, name: &str) -> Option<&Field<'a>> {
        self.fields.iter().find(|(key, _)| key == name).map(|(_, field)| field)
    }

    /// Gives fields the names that the formats know them by: `columns` has the row's name of each. A field that had such a
    /// name is hidden.
    pub fn rename(&mut self, columns: &BTreeMap<String, String>) {
        if columns.is_empty() {
            return;
        }
        self.fields.retain(|(name, _)| !columns.contains_key(&**name) || columns.values().any(|own| own == name));
        for (name, _) in &mut self.fields {
            if let Some((known, _)) = columns.iter().find(|(_, own)| *own == name) {
                *name = Cow::Owned(known.clone());
            }
        }
    }

    /// The names of the fields, for an error.
    pub fn names(&self) -> String {
        match self.fields.as_slice() {
            [] => "no fields".into(),
            fields => {
                let names: Vec<String> = fields.iter().take(20).map(|(name, _)| format!("\"{name}\"")).collect();
                format!("{}{}", names.join(", "), if fields.len() > 20 { ", ..." } else { "" })
            }
        }
    }

    /// The row, without the line that it was read from.
    pub fn into_owned(self) -> Row<'static> {
        let own = |field: Field<'a>| match field {
            Field::Text(text) => Field::Text(Cow::Owned(text.into_owned())),
            Field::Other(value) => Field::Other(value),
        };
        let fields = self.fields.into_iter();
        Row { fields: fields.map(|(name, field)| (Cow::Owned(name.into_owned()), own(field))).collect() }
    }

    /// Identifies the row by one of its fields.
    pub fn hash_of(&self, name: &str) -> Option<u128> {
        let mut hasher = blake3::Hasher::new_derive_key("unisono 1 group of rows");
        match self.get(name)? {
            Field::Text(text) => put(&mut hasher, b's', text.as_bytes()),
            Field::Other(value) => put_value(&mut hasher, value),
        }
        let mut bytes = [0; 16];
        hasher.finalize_xof().fill(&mut bytes);
        Some(u128::from_be_bytes(bytes))
    }

    /// Identifies the row whatever its white space, escapes and order of fields.
    pub fn hash(&self) -> u128 {
        let mut hasher = blake3::Hasher::new_derive_key("unisono 1 source row");
        let mut fields: Vec<&(Cow<'_, str>, Field<'_>)> = self.fields.iter().collect();
        fields.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        for (name, field) in fields {
            put(&mut hasher, b'k', name.as_bytes());
            match field {
                Field::Text(text) => put(&mut hasher, b's', text.as_bytes()),
                Field::Other(value) => put_value(&mut hasher, value),
            }
        }
        let mut bytes = [0; 16];
        hasher.finalize_xof().fill(&mut bytes);
        u128::from_be_bytes(bytes)
    }
}

fn put(hasher: &mut blake3::Hasher, tag: u8, bytes: &[u8]) {
    hasher.update(&[tag]).update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
}

fn put_value(hasher: &mut blake3::Hasher, value: &Value) {
    match value {
        Value::Null => put(hasher, b'n', &[]),
        Value::Bool(b) => put(hasher, b'b', &[u8::from(*b)]),
        Value::Number(n) => put(hasher, b'd', n.to_string().as_bytes()),
        Value::String(s) => put(hasher, b's', s.as_bytes()),
        Value::Array(list) => {
            put(hasher, b'a', &(list.len() as u64).to_le_bytes());
            list.iter().for_each(|v| put_value(hasher, v));
        }
        Value::Object(map) => {
            put(hasher, b'o', &(map.len() as u64).to_le_bytes());
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by_key(|(k, _)| *k);
            for (key, value) in entries {
                put(hasher, b'k', key.as_bytes());
                put_value(hasher, value);
            }
        }
    }
}

impl<'de> Deserialize<'de> for Row<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Row<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row<'de>, A::Error> {
                let mut fields: Vec<(Cow<'de, str>, Field<'de>)> = Vec::new();
                while let Some(Field::Text(name)) = map.next_key()? {
                    if fields.iter().any(|(known, _)| *known == name) {
                        return Err(serde::de::Error::custom(format!("field \"{name}\" occurs twice")));
                    }
                    fields.push((name, map.next_value()?));
                }
                Ok(Row { fields })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl<'de> Deserialize<'de> for Field<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Field<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }
            fn visit_borrowed_str<E>(self, v: &'de str) -> Result<Self::Value, E> {
                Ok(Field::Text(Cow::Borrowed(v)))
            }
            fn visit_str<E>(self, v: &str) -> Result<Self::Value, E> {
                Ok(Field::Text(Cow::Owned(v.to_owned())))
            }
            fn visit_string<E>(self, v: String) -> Result<Self::Value, E> {
                Ok(Field::Text(Cow::Owned(v)))
            }
            fn visit_bool<E>(self, v: bool) -> Result<Self::Value, E> {
                Ok(Field::Other(v.into()))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Self::Value, E> {
                Ok(Field::Other(v.into()))
            }
            fn visit_u64<E>(self, v: u64) -> Result<Self::Value, E> {
                Ok(Field::Other(v.into()))
            }
            fn visit_f64<E>(self, v: f64) -> Result<Self::Value, E> {
                Ok(Field::Other(v.into()))
            }
            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Field::Other(Value::Null))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                Value::deserialize(SeqAccessDeserializer::new(seq)).map(Field::Other)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                Value::deserialize(MapAccessDeserializer::new(map)).map(Field::Other)
            }
        }
        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(json: &str) -> Row<'_> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_hash_sees_the_content_only() {
        let hash = |json: &str| row(json).hash();
        assert_eq!(
            hash(r#"{"a":"x","b":[1,{"c":null,"d":2.5}]}"#),
            hash(r#" { "b":[1, {"d":2.5,"c":null}], "a":"\u0078" }"#)
        );
        let different =
            [r#"{"a":"x"}"#, r#"{"a":"y"}"#, r#"{"b":"x"}"#, r#"{"a":["x"]}"#, r#"{"a":"1"}"#, r#"{"a":1}"#, "{}"];
        for (i, a) in different.iter().enumerate() {
            different[i + 1..].iter().for_each(|b| assert_ne!(hash(a), hash(b), "{a} {b}"));
        }
    }

    #[test]
    fn fields_can_be_renamed_and_swapped() {
        let columns = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        let mut one = row(r#"{"q":"x","prompt":"hidden","a":"y"}"#);
        one.rename(&columns(&[("prompt", "q"), ("completion", "a")]));
        assert_eq!(one, row(r#"{"prompt":"x","completion":"y"}"#));
        let mut two = row(r#"{"prompt":"x","completion":"y"}"#);
        two.rename(&columns(&[("prompt", "completion"), ("completion", "prompt")]));
        assert_eq!(two, row(r#"{"completion":"x","prompt":"y"}"#));
    }

    #[test]
    fn strings_are_borrowed_unless_escaped() {
        let row = row(r#"{"plain":"x","escaped":"a\nb"}"#);
        assert!(matches!(row.get("plain"), Some(Field::Text(Cow::Borrowed("x")))));
        assert!(matches!(row.get("escaped"), Some(Field::Text(Cow::Owned(_)))));
    }

    #[test]
    fn a_repeated_field_is_refused() {
        let error = serde_json::from_str::<Row<'_>>(r#"{"a":1,"a":2}"#).unwrap_err().to_string();
        assert!(error.contains("\"a\" occurs twice"), "{error}");
    }
}
