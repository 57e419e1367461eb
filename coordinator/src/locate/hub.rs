//! The Hugging Face Hub's local cache: `models--org--name/snapshots/<commit>/`, with what branches and tags name in `refs/`.

use super::Kind;
use std::path::{Path, PathBuf};

pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Where huggingface_hub keeps it.
    pub fn of_user() -> Self {
        let root = super::directory(&[
            ("HF_HUB_CACHE", ""),
            ("HUGGINGFACE_HUB_CACHE", ""),
            ("HF_HOME", "hub"),
            ("XDG_CACHE_HOME", "huggingface/hub"),
            ("HOME", ".cache/huggingface/hub"),
        ]);
        Cache { root }
    }

    /// The directory of `org/name`; of a data set also files in it, or those to train on. Errors are the end of a sentence
    /// that begins with the name.
    pub fn find(&self, kind: Kind, text: &str, revision: Option<&str>) -> Result<PathBuf, String> {
        let mut parts = text.splitn(3, '/');
        let (org, name, rest) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next());
        let id = format!("{org}/{name}");
        let snapshot = self.snapshot(kind, &id, revision)?;
        match (kind, rest) {
            (_, Some(rest)) => Ok(snapshot.join(rest)),
            (Kind::Model, None) => Ok(snapshot),
            (Kind::Data, None) => training_files(&snapshot, &id),
        }
    }

    fn snapshot(&self, kind: Kind, id: &str, revision: Option<&str>) -> Result<PathBuf, String> {
        let (folder, option) = match kind {
            Kind::Model => ("models", ""),
            Kind::Data => ("datasets", "--repo-type dataset "),
        };
        let home = self.root.join(format!("{folder}--{}", id.replace('/', "--")));
        let wanted = revision.map(|r| format!(" --revision {r}")).unwrap_or_default();
        let command = format!("run: hf download {option}{id}{wanted}");
        if !home.is_dir() {
            return Err(format!(
                "is neither a file here nor in the Hugging Face cache ({}); correct the path, or {command}",
                self.root.display()
            ));
        }
        let revision = revision.unwrap_or("main");
        let named = std::fs::read_to_string(home.join("refs").join(revision));
        let commit = named.map_or_else(|_| revision.to_owned(), |text| text.trim().to_owned());
        let snapshot = home.join("snapshots").join(&commit);
        match snapshot.is_dir() {
            true => Ok(snapshot),
            false => {
                let there = names(&home.join("snapshots")).join(", ");
                let there = if there.is_empty() { "nothing".into() } else { there };
                Err(format!(
                    "is in the Hugging Face cache, but not its revision {revision} (there: {there}); {command}"
                ))
            }
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Of a data set's files those whose names say "train", where any do: a directory, or a glob.
fn training_files(snapshot: &Path, id: &str) -> Result<PathBuf, String> {
    let mut all = Vec::new();
    collect(snapshot, snapshot, &mut all);
    let named: Vec<&PathBuf> = all.iter().filter(|path| path.to_string_lossy().contains("train")).collect();
    let chosen: Vec<&PathBuf> = if named.is_empty() { all.iter().collect() } else { named };
    let ending = |path: &Path| path.extension().map(|e| e.to_string_lossy().into_owned()).unwrap_or_default();
    let mut groups: Vec<(PathBuf, String)> =
        chosen.iter().map(|path| (path.parent().map(Path::to_path_buf).unwrap_or_default(), ending(path))).collect();
    groups.dedup();
    match groups.as_slice() {
        [] => Err(format!("has no .jsonl, .json or .parquet file in the Hugging Face cache; run: hf download --repo-type dataset {id}")),
        [(directory, ending)] => {
            let beside = all.iter().filter(|path| path.parent() == Some(directory)).count();
            let directory = snapshot.join(directory);
            Ok(if beside == chosen.len() { directory } else { directory.join(format!("*train*.{ending}")) })
        }
        several => {
            let choices: Vec<String> =
                several.iter().map(|(at, ending)| format!("\"{}\"", Path::new(id).join(at).join(format!("*.{ending}")).display())).collect();
            Err(format!("has rows of several kinds; name one: {}", choices.join(", ")))
        }
    }
}

/// Data files below `at`, relative to `root`, in order.
fn collect(root: &Path, at: &Path, found: &mut Vec<PathBuf>) {
    for name in names(at) {
        let path = at.join(&name);
        if path.is_dir() && !name.starts_with('.') {
            collect(root, &path, found);
        } else if [".jsonl", ".json", ".parquet"].iter().any(|ending| name.ends_with(ending))
            && name != "dataset_infos.json"
        {
            found.extend(path.strip_prefix(root).map(Path::to_path_buf));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn snapshots_are_found_by_branch_tag_and_commit() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(root, "models--Qwen--Q/refs/main", "abc\n");
        put(root, "models--Qwen--Q/refs/v1.0", "def");
        put(root, "models--Qwen--Q/snapshots/abc/config.json", "{}");
        put(root, "models--Qwen--Q/snapshots/def/config.json", "{}");
        let cache = Cache { root: root.into() };
        let find = |revision| cache.find(Kind::Model, "Qwen/Q", revision).map(|p| p.file_name().unwrap().to_owned());
        assert_eq!(
            (find(None).unwrap(), find(Some("v1.0")).unwrap(), find(Some("def")).unwrap()),
            ("abc".into(), "def".into(), "def".into())
        );
        assert_eq!(
            find(Some("v2")).unwrap_err(),
            "is in the Hugging Face cache, but not its revision v2 (there: abc, def); run: hf download Qwen/Q --revision v2"
        );
        let absent = cache.find(Kind::Data, "a/b", None).unwrap_err();
        assert!(absent.ends_with("correct the path, or run: hf download --repo-type dataset a/b"), "{absent}");
    }

    #[test]
    fn of_a_data_set_the_training_files_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let home = |name: &str| format!("datasets--o--d/snapshots/abc/{name}");
        put(dir.path(), "datasets--o--d/refs/main", "abc");
        put(dir.path(), &home("README.md"), "");
        put(dir.path(), &home("main/train-00000-of-00002.parquet"), "");
        put(dir.path(), &home("main/train-00001-of-00002.parquet"), "");
        let cache = Cache { root: dir.path().into() };
        let find = |text: &str| {
            let found = cache.find(Kind::Data, text, None)?;
            Ok::<_, String>(
                found.strip_prefix(dir.path().join("datasets--o--d/snapshots/abc")).unwrap().display().to_string(),
            )
        };
        assert_eq!(find("o/d").unwrap(), "main");
        put(dir.path(), &home("main/test-00000-of-00001.parquet"), "");
        assert_eq!(find("o/d").unwrap(), "main/*train*.parquet");
        assert_eq!(find("o/d/main/test-*").unwrap(), "main/test-*");
        put(dir.path(), &home("socratic/train-00000-of-00001.parquet"), "");
        assert_eq!(
            find("o/d").unwrap_err(),
            "has rows of several kinds; name one: \"o/d/main/*.parquet\", \"o/d/socratic/*.parquet\""
        );
    }
}
