//! Files of an object store, fetched once: a directory of the cache holds one version of what a URL names, known by the
//! store's own marks of its content.

use super::Kind;
use object_store::path::Path as Key;
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt};
use std::io::Write;
use std::path::{Path, PathBuf};
use tokio_stream::StreamExt;

/// The user's cache of fetched files.
pub fn cache() -> PathBuf {
    super::directory(&[("UNISONO_CACHE", ""), ("XDG_CACHE_HOME", "unisono"), ("HOME", ".cache/unisono")])
}

/// The path of what `url` names: a file, a directory, or a glob in one. Errors are the end of a sentence that begins with
/// the URL.
pub fn fetch(url: &str, cache: &Path, kind: Kind) -> Result<PathBuf, String> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
    let store = crate::store::bucket(scheme, bucket).map_err(|error| error.to_string())?;
    let home = cache.join(scheme).join(bucket);
    // The caller may itself be inside of a runtime.
    let (key, url) = (key.to_owned(), url.to_owned());
    let work = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("cannot be fetched ({error})"))?;
        runtime.block_on(bring(&*store, &key, &home, kind, &url))
    });
    work.join().unwrap_or_else(|_| Err("cannot be fetched (the fetching thread panicked)".into()))
}

/// Brings what `key` names below `home`.
async fn bring(store: &dyn ObjectStore, key: &str, home: &Path, kind: Kind, url: &str) -> Result<PathBuf, String> {
    let failed = |error: object_store::Error| {
        let help = "; credentials come from the environment, as AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS";
        format!("cannot be fetched ({}){help}", line(&error))
    };
    let globbed = key.contains(['*', '?']);
    let whole =
        if globbed || key.ends_with('/') || key.is_empty() { None } else { head(store, key).await.map_err(failed)? };
    if let Some(meta) = whole {
        let name = key.rsplit('/').next().unwrap_or(key).to_owned();
        let at = version(home, key, std::slice::from_ref(&meta));
        download(store, &[(name.clone(), meta)], &at, url).await.map_err(failed)?;
        return Ok(at.join(name));
    }
    // Everything before the first component with a glob.
    let fixed: Vec<&str> =
        key.split('/').filter(|part| !part.is_empty()).take_while(|part| !part.contains(['*', '?'])).collect();
    let (prefix, depth) = (fixed.join("/"), fixed.len());
    let pattern: Vec<&str> = key.split('/').filter(|part| !part.is_empty()).skip(depth).collect();
    let mut found: Vec<(String, ObjectMeta)> = Vec::new();
    let mut list = store.list(Some(&Key::from(prefix.as_str())));
    while let Some(meta) = list.next().await {
        let meta = meta.map_err(failed)?;
        let relative: Vec<String> = meta.location.parts().skip(depth).map(|part| part.as_ref().to_owned()).collect();
        let fits = |(pattern, part): (&&str, &String)| crate::data::fits_glob(pattern.as_bytes(), part.as_bytes());
        let wanted = match globbed {
            true => relative.len() == pattern.len() && pattern.iter().zip(&relative).all(fits),
            // A directory's files, not those of directories in it; of a model no checkpoints of other frameworks.
            false => {
                relative.len() == 1
                    && (kind == Kind::Data || !relative[0].ends_with(".bin") && !relative[0].ends_with(".pth"))
            }
        };
        if wanted {
            found.push((relative.join("/"), meta));
        }
    }
    if found.is_empty() {
        return Err("names nothing in the store; correct it".into());
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let metas: Vec<ObjectMeta> = found.iter().map(|(_, meta)| meta.clone()).collect();
    let at = version(home, &prefix, &metas);
    download(store, &found, &at, url).await.map_err(failed)?;
    Ok(if globbed { at.join(pattern.join("/")) } else { at })
}

async fn head(store: &dyn ObjectStore, key: &str) -> Result<Option<ObjectMeta>, object_store::Error> {
    match store.head(&Key::from(key)).await {
        Ok(meta) => Ok(Some(meta)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The directory of one version of these objects.
fn version(home: &Path, key: &str, objects: &[ObjectMeta]) -> PathBuf {
    let mut hasher = blake3::Hasher::new_derive_key("unisono 1 fetched objects");
    for meta in objects {
        let changed = meta.last_modified.timestamp_micros().to_string();
        let mark = meta.e_tag.as_deref().unwrap_or(&changed);
        for part in [meta.location.as_ref(), mark, &meta.size.to_string()] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
    }
    let mark = &hasher.finalize().to_hex()[..16];
    let key = key.trim_matches('/');
    let name = if key.is_empty() {
        "all".into()
    } else {
        key.replace(|c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c), "-")
    };
    home.join(format!("{name}@{mark}"))
}

/// Fetches what is not there yet. A file gets its name when it is whole and on disk.
async fn download(
    store: &dyn ObjectStore,
    objects: &[(String, ObjectMeta)],
    at: &Path,
    url: &str,
) -> Result<(), object_store::Error> {
    let io = |error: std::io::Error| object_store::Error::Generic { store: "cache", source: Box::new(error) };
    let whole = |name: &str, size: u64| std::fs::metadata(at.join(name)).is_ok_and(|m| m.len() == size);
    let missing: Vec<&(String, ObjectMeta)> = objects.iter().filter(|(name, meta)| !whole(name, meta.size)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let bytes: u64 = missing.iter().map(|(_, meta)| meta.size).sum();
    tracing::info!(url, files = missing.len(), bytes, to = %at.display(), "fetching");
    for (name, meta) in missing {
        let path = at.join(name);
        let directory = path.parent().unwrap_or(at);
        std::fs::create_dir_all(directory).map_err(io)?;
        let options = GetOptions { if_match: meta.e_tag.clone(), ..GetOptions::default() };
        let mut stream = store.get_opts(&meta.location, options).await?.into_stream();
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(io)?;
        while let Some(part) = stream.next().await {
            file.write_all(&part?).map_err(io)?;
        }
        let got = file.as_file().metadata().map_err(io)?.len();
        if got != meta.size {
            let short = std::io::Error::other(format!("{name} has {} bytes, but {got} came", meta.size));
            return Err(io(short));
        }
        file.as_file().sync_all().map_err(io)?;
        file.persist(&path).map_err(|error| io(error.error))?;
    }
    Ok(())
}

/// An error with its causes, on one line.
fn line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text += &format!(": {more}");
        }
        cause = next.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;

    fn run<T>(work: impl std::future::Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    fn put(store: &InMemory, key: &str, text: &str) {
        run(store.put(&Key::from(key), text.to_owned().into())).unwrap();
    }

    #[test]
    fn objects_are_fetched_once_for_each_version() {
        let (store, dir) = (InMemory::new(), tempfile::tempdir().unwrap());
        for (key, text) in
            [("d/a/x1.jsonl", "one"), ("d/a/x2.jsonl", "two"), ("d/b/x1.jsonl", "three"), ("d/notes", "")]
        {
            put(&store, key, text);
        }
        let bring = |key: &str| run(bring(&store, key, dir.path(), Kind::Data, "m://b"));
        let one = bring("d/a/x1.jsonl").unwrap();
        assert_eq!(std::fs::read_to_string(&one).unwrap(), "one");
        // What is there is not fetched again.
        std::fs::write(&one, "eno").unwrap();
        assert_eq!(std::fs::read_to_string(bring("d/a/x1.jsonl").unwrap()).unwrap(), "eno");
        // What is not whole is.
        std::fs::write(&one, "e").unwrap();
        assert_eq!(std::fs::read_to_string(bring("d/a/x1.jsonl").unwrap()).unwrap(), "one");
        put(&store, "d/a/x1.jsonl", "new");
        let new = bring("d/a/x1.jsonl").unwrap();
        assert_eq!((std::fs::read_to_string(&new).unwrap().as_str(), new != one), ("new", true));
        for directory in ["d/a", "d/a/"] {
            let found = bring(directory).unwrap();
            assert_eq!(std::fs::read_dir(&found).unwrap().count(), 2);
        }
        let glob = bring("d/*/x1.*").unwrap();
        let home = glob.parent().and_then(Path::parent).unwrap();
        assert!(glob.ends_with("*/x1.*") && home.join("a/x1.jsonl").is_file() && home.join("b/x1.jsonl").is_file());
        assert!(fetch("s3:///b", dir.path(), Kind::Data).unwrap_err().contains("names no bucket"));
        assert_eq!(bring("nothing").unwrap_err(), "names nothing in the store; correct it");
    }
}
