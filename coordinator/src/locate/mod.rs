//! Where a configuration's model and data are: paths as they are, names of the Hugging Face Hub in its local cache, and
//! URLs of object stores, fetched once into a cache of their own. Afterwards every path of the configuration is a file's.

mod hub;
#[cfg(feature = "stores")]
mod store;

use std::path::{Path, PathBuf};
use unisono_configs::run::{Held, RunConfig};

#[derive(Debug, thiserror::Error)]
#[error("{key} = \"{source}\" {problem}", source = source_name.display())]
pub struct Error {
    key: String,
    source_name: PathBuf,
    problem: String,
}

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    Data,
}

/// Replaces what is no path by where it is on this machine. A task keeps the name that it had.
pub fn locate(config: &mut RunConfig) -> Result<(), Error> {
    let model = &mut config.model;
    model.path = find(Kind::Model, "model.path", &model.path, model.revision.as_deref())?;
    for data in &mut config.data {
        let task = data.task();
        let revision = data.revision.as_deref();
        let path = find(Kind::Data, "data.path", &data.path, revision)?;
        if path != data.path {
            data.name = Some(task);
            data.path = path;
        }
        for (key, held) in [("data.validation", &mut data.validation), ("data.test", &mut data.test)] {
            if let Some(Held::File(path)) = held {
                *path = find(Kind::Data, key, path, revision)?;
            }
        }
    }
    Ok(())
}

fn find(kind: Kind, key: &str, source: &Path, revision: Option<&str>) -> Result<PathBuf, Error> {
    let refuse = |problem: String| Error { key: key.into(), source_name: source.into(), problem };
    let text = source.to_string_lossy();
    if text.contains("://") {
        return fetch(&text, kind).map_err(refuse);
    }
    // The configuration keeps only what may be on the Hub relative; everything else is absolute.
    match source.is_absolute() {
        // A run that goes on has recorded the snapshot that it began with.
        true if revision.is_some() && !source.iter().any(|part| part == "snapshots") => Err(refuse(
            "is a path on this machine and has no revision; remove the revision, or correct the path".into(),
        )),
        true => Ok(source.into()),
        false => hub::Cache::of_user().find(kind, &text, revision).map_err(refuse),
    }
}

/// A file: URL is a path; what other URLs name is fetched.
fn fetch(url: &str, kind: Kind) -> Result<PathBuf, String> {
    let scheme = url.split("://").next().unwrap_or_default();
    match (scheme, url.strip_prefix("file://")) {
        (_, Some(path)) => Ok(path.into()),
        #[cfg(feature = "stores")]
        ("s3" | "s3a" | "gs", _) => store::fetch(url, &store::cache(), kind),
        #[cfg(not(feature = "stores"))]
        ("s3" | "s3a" | "gs", _) => {
            let _ = kind;
            Err("needs a program that was built with `make build STORES=1`; build it so, or download the files first"
                .into())
        }
        _ => Err(format!("begins with {scheme}://, but only s3://, gs:// and file:// can be read; download it first")),
    }
}

/// The first of these variables that is set, with more of a path behind it.
fn directory(variables: &[(&str, &str)]) -> PathBuf {
    let found = variables.iter().find_map(|(name, below)| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
        Some(PathBuf::from(value).join(below))
    });
    found.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_no_revision_unless_it_is_a_snapshot() {
        let find = |source: &str| find(Kind::Model, "model.path", Path::new(source), Some("main"));
        assert!(find("/models/tiny").unwrap_err().to_string().contains("has no revision"));
        assert!(find("/hub/models--o--n/snapshots/abc").is_ok());
    }

    #[test]
    fn paths_stay_and_other_schemes_are_refused() {
        let find = |source: &str| find(Kind::Data, "data.path", Path::new(source), None);
        assert_eq!(find("/a/b.jsonl").unwrap(), Path::new("/a/b.jsonl"));
        assert_eq!(find("file:///a/b.jsonl").unwrap(), Path::new("/a/b.jsonl"));
        assert_eq!(
            find("ftp://a/b").unwrap_err().to_string(),
            "data.path = \"ftp://a/b\" begins with ftp://, but only s3://, gs:// and file:// can be read; download it first"
        );
    }
}
