//! Rows of a Parquet file, each as the JSON object that a JSONL file would have on its line.

use super::lines::{At, Mapped};
use super::{Error, Progress};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use rayon::prelude::*;
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// What a Parquet file begins with.
pub const MAGIC: &[u8] = b"PAR1";
/// Rows decoded at once.
const BATCH: usize = 4096;

fn open(path: &Path, file: File) -> Result<SerializedFileReader<File>, Error> {
    SerializedFileReader::new(file).map_err(|error| damaged(path, &error))
}

fn damaged(path: &Path, error: &dyn std::fmt::Display) -> Error {
    let problem = format!("is a damaged Parquet file ({error}); download or write it again");
    Error::File { path: path.into(), problem }
}

/// As `map_lines`, with the number of the row, from 1, for a line's. The rows are written out into a file without a name,
/// which goes with its last user, because single rows of a Parquet file cannot be read again.
pub fn map_rows<T: Send>(
    path: &Path,
    file: File,
    progress: &dyn Progress,
    work: impl Fn(At, &[u8]) -> T + Sync,
) -> Result<Mapped<T>, Error> {
    let bytes = file.metadata().map_or(0, |m| m.len());
    let reader = open(path, file)?;
    let mut results = Vec::new();
    let unwritable = |error: std::io::Error| Error::File {
        path: path.into(),
        problem: format!(
            "its rows cannot be written into {} ({error}); free space there, or set TMPDIR",
            std::env::temp_dir().display()
        ),
    };
    let mut spool = tempfile::tempfile().map_err(unwritable)?;
    let (mut number, mut offset) = (0u64, 0u64);
    let groups = reader.num_row_groups();
    for group in 0..groups {
        let group_reader = reader.get_row_group(group).map_err(|error| damaged(path, &error))?;
        let mut rows = RowIter::from_row_group(None, &*group_reader).map_err(|error| damaged(path, &error))?;
        loop {
            let batch = rows.by_ref().take(BATCH).collect::<Result<Vec<_>, _>>().map_err(|e| damaged(path, &e))?;
            if batch.is_empty() {
                break;
            }
            let texts: Vec<Vec<u8>> =
                batch.into_par_iter().with_min_len(32).map(|row| object(row.to_json_value())).collect();
            let mut placed: Vec<(At, &[u8])> = Vec::with_capacity(texts.len());
            for text in &texts {
                number += 1;
                placed.push((At { line: number, offset }, text));
                offset += text.len() as u64;
            }
            spool.write_all(&texts.concat()).map_err(unwritable)?;
            results.par_extend(placed.into_par_iter().with_min_len(32).map(|(at, text)| work(at, text)));
        }
        progress.advance(bytes * (group as u64 + 1) / groups as u64 - bytes * group as u64 / groups as u64);
    }
    Ok(Mapped { results, spool: Some(spool) })
}

/// What `work` makes of the first rows, at most `count` and no more than [`BATCH`], with their numbers.
pub fn first_rows<T>(path: &Path, file: File, count: usize, work: impl Fn(&[u8]) -> T) -> Result<Vec<(u64, T)>, Error> {
    let reader = open(path, file)?;
    let rows = reader.get_row_iter(None).map_err(|error| damaged(path, &error))?;
    let numbered = rows.take(count.min(BATCH)).enumerate();
    numbered
        .map(|(index, row)| match row {
            Ok(row) => Ok((index as u64 + 1, work(&object(row.to_json_value())))),
            Err(error) => Err(damaged(path, &error)),
        })
        .collect()
}

fn object(mut row: Value) -> Vec<u8> {
    if let Value::Object(fields) = &mut row {
        fields.values_mut().for_each(without_nulls);
    }
    row.to_string().into_bytes()
}

/// All objects of a column have the same fields, those that some rows lack as null: the message of a user has tool_calls,
/// and every call the arguments of all tools. A template must not see them.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(without_nulls),
        Value::Object(fields) => {
            fields.retain(|name, value| !value.is_null() || name == "content");
            fields.values_mut().for_each(without_nulls);
        }
        _ => (),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::basic::{Compression, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    const SCHEMA: &str = "message schema {
        OPTIONAL INT64 id;
        OPTIONAL GROUP messages (LIST) { REPEATED GROUP list { OPTIONAL GROUP element {
            OPTIONAL BYTE_ARRAY role (UTF8); OPTIONAL BYTE_ARRAY content (UTF8); OPTIONAL BYTE_ARRAY name (UTF8); } } }
    }";

    /// `rows` conversations of two messages, in groups of `group` rows.
    pub fn write(path: &Path, rows: usize, group: usize, compression: Compression) {
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        let all: Vec<usize> = (0..rows).collect();
        for rows in all.chunks(group) {
            let mut group = writer.next_row_group().unwrap();
            let text = |text: String| ByteArray::from(text.into_bytes());
            let mut column = group.next_column().unwrap().unwrap();
            let ids: Vec<i64> = rows.iter().map(|&i| i as i64).collect();
            column.typed::<Int64Type>().write_batch(&ids, Some(&vec![1; ids.len()]), None).unwrap();
            column.close().unwrap();
            let repeated: Vec<i16> = rows.iter().flat_map(|_| [0, 1]).collect();
            let columns: [(Vec<ByteArray>, i16); 3] = [
                (rows.iter().flat_map(|_| [text("user".into()), text("assistant".into())]).collect(), 4),
                (rows.iter().flat_map(|i| [text(format!("w{i}")), text("é \"w\"".into())]).collect(), 4),
                (Vec::new(), 3),
            ];
            for (values, level) in columns {
                let mut column = group.next_column().unwrap().unwrap();
                let levels = vec![level; repeated.len()];
                column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), Some(&repeated)).unwrap();
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    #[test]
    fn rows_are_those_of_a_jsonl_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.parquet");
        let packed = [
            Compression::SNAPPY,
            Compression::ZSTD(ZstdLevel::default()),
            Compression::UNCOMPRESSED,
            Compression::LZ4_RAW,
        ];
        for compression in packed {
            write(&path, 10_000, 3_000, compression);
            let open = || File::open(&path).unwrap();
            let rows = map_rows(&path, open(), &(), |at, text| (at, String::from_utf8(text.to_vec()).unwrap()));
            let Mapped { results, spool } = rows.unwrap();
            let at = results[9_999].0;
            let mut last = vec![0; results[9_999].1.len()];
            spool.unwrap().read_exact_at(&mut last, at.offset).unwrap();
            assert_eq!(last, results[9_999].1.as_bytes());
            let rows: Vec<(u64, String)> = results.into_iter().map(|(at, text)| (at.line, text)).collect();
            assert_eq!(rows.len(), 10_000);
            let expected = r#"{"id":7003,"messages":[{"role":"user","content":"w7003"},{"role":"assistant","content":"é \"w\""}]}"#;
            assert_eq!(rows[7003], (7004, expected.to_owned()));
            let first = first_rows(&path, open(), 2, |text| text.len()).unwrap();
            assert_eq!(first, [(1, rows[0].1.len()), (2, rows[1].1.len())]);
        }
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 100]).unwrap();
        let error = map_rows(&path, File::open(&path).unwrap(), &(), |_, _| ()).unwrap_err().to_string();
        assert!(error.contains("rows.parquet: is a damaged Parquet file"), "{error}");
    }
}
