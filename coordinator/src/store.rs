//! Object stores by URL: `s3://`, `gs://` (where they are built in), `file://` and plain absolute paths. Calls block; each store
//! has a small runtime of its own, so they are for threads that belong to no other.

use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload, WriteMultipart};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;

/// Bytes of one part of an upload: the least that every store takes is 5 MiB.
const PART: usize = 8 << 20;

/// Parts under way at a time.
const PARTS: usize = 4;

/// Why a store cannot be used: the end of a sentence that begins with the URL.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Url(String),
    #[error("cannot be reached or refuses ({0}); credentials come from the environment, as AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS")]
    Store(#[from] object_store::Error),
    #[error("cannot be copied ({0})")]
    File(#[from] std::io::Error),
}

/// Part of a store: everything below a prefix.
pub struct Store {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    runtime: Runtime,
}

/// Whether `text` names a store rather than a relative path.
pub fn is_url(text: &str) -> bool {
    text.contains("://")
}

/// The bucket of an object store, with credentials from the environment.
pub fn bucket(scheme: &str, bucket: &str) -> Result<Arc<dyn ObjectStore>, Error> {
    #[cfg(feature = "stores")]
    {
        if bucket.is_empty() {
            return Err(Error::Url(format!("names no bucket; write {scheme}://bucket/key")));
        }
        // Another part of the program may have chosen it already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(match scheme {
            "s3" | "s3a" => Arc::new(object_store::aws::AmazonS3Builder::from_env().with_bucket_name(bucket).build()?),
            _ => Arc::new(object_store::gcp::GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).build()?),
        })
    }
    #[cfg(not(feature = "stores"))]
    Err(Error::Url(format!("needs a program that was built with `make build STORES=1`, as {scheme}://{bucket} is reached over the network; build it so, or name a directory")))
}

/// A store that does not answer holds nobody up for longer.
#[cfg(feature = "stores")]
fn patience() -> object_store::RetryConfig {
    object_store::RetryConfig { retry_timeout: std::time::Duration::from_secs(60), ..Default::default() }
}

impl Error {
    /// What was asked for is not there; everything else may be better next time.
    pub fn is_absence(&self) -> bool {
        matches!(self, Error::Store(object_store::Error::NotFound { .. }))
    }
}

impl Store {
    /// What lies below `url`. A directory is made where it does not exist.
    pub fn open(url: &str) -> Result<Self, Error> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("file", url));
        let (store, key): (Arc<dyn ObjectStore>, &str) = match scheme {
            "file" if Path::new(rest).is_absolute() => {
                std::fs::create_dir_all(rest)?;
                (Arc::new(LocalFileSystem::new_with_prefix(rest)?.with_fsync(true)), "")
            }
            "file" => return Err(Error::Url("is no absolute path; write /directory or scheme://bucket/prefix".into())),
            "s3" | "s3a" | "gs" => {
                let (name, key) = rest.split_once('/').unwrap_or((rest, ""));
                (bucket(scheme, name)?, key)
            }
            other => {
                return Err(Error::Url(format!("begins with {other}://, but only s3://, gs:// and file:// are known")))
            }
        };
        Self::new(store, Key::from(key))
    }

    pub fn new(store: Arc<dyn ObjectStore>, prefix: Key) -> Result<Self, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Store { store, prefix, runtime })
    }

    fn key(&self, name: &str) -> Key {
        name.split('/').filter(|part| !part.is_empty()).fold(self.prefix.clone(), |key, part| key.join(part))
    }

    /// Names of all objects whose names begin with the directory `below` (or of all), and their bytes, in order.
    pub fn list(&self, below: &str) -> Result<Vec<(String, u64)>, Error> {
        let (base, under) = (self.prefix.parts().count(), self.key(below));
        let mut found = self.runtime.block_on(async {
            let (mut list, mut found) = (self.store.list(Some(&under)), Vec::new());
            while let Some(meta) = list.next().await {
                let meta = meta?;
                let name: Vec<_> = meta.location.parts().skip(base).map(|p| p.as_ref().to_owned()).collect();
                found.push((name.join("/"), meta.size));
            }
            Ok::<_, Error>(found)
        })?;
        found.sort_unstable();
        Ok(found)
    }

    /// Writes a small object if there is none of its name: true if this call did.
    pub fn create(&self, name: &str, content: Vec<u8>) -> Result<bool, Error> {
        let key = self.key(name);
        let put = self.store.put_opts(&key, PutPayload::from(content), PutMode::Create.into());
        match self.runtime.block_on(put) {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes a file of any size in parts; whatever had its name is replaced when the last part is there. Its bytes and their
    /// BLAKE3; `progress` hears of each block.
    pub fn upload(&self, name: &str, file: &mut File, progress: impl Fn(u64)) -> Result<(u64, blake3::Hash), Error> {
        let (mut block, mut bytes, mut hasher) = (vec![0; 1 << 20], 0, blake3::Hasher::new());
        self.runtime.block_on(async {
            let upload = self.store.put_multipart_opts(&self.key(name), Default::default()).await?;
            let mut parts = WriteMultipart::new_with_chunk_size(upload, PART);
            let problem: Error = loop {
                match file.read(&mut block) {
                    Ok(0) => {
                        parts.finish().await?;
                        return Ok((bytes, hasher.finalize()));
                    }
                    Ok(read) => {
                        if let Err(error) = parts.wait_for_capacity(PARTS).await {
                            break error.into();
                        }
                        parts.write(&block[..read]);
                        hasher.update(&block[..read]);
                        bytes += read as u64;
                        progress(bytes);
                    }
                    Err(error) => break error.into(),
                }
            };
            // What was sent is of no use; where it cannot be deleted now, the store's own rules do.
            parts.abort().await.ok();
            Err(problem)
        })
    }

    /// Reads a small object whole.
    pub fn get(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.runtime.block_on(async { Ok(self.store.get(&self.key(name)).await?.bytes().await?.to_vec()) })
    }

    /// Reads an object of any size into `to`; its BLAKE3.
    pub fn download(&self, name: &str, to: &Path) -> Result<blake3::Hash, Error> {
        let (mut out, mut hasher) = (File::create_new(to)?, blake3::Hasher::new());
        self.runtime.block_on(async {
            let mut stream = self.store.get(&self.key(name)).await?.into_stream();
            while let Some(block) = stream.next().await {
                let block = block?;
                hasher.update(&block);
                out.write_all(&block)?;
            }
            Ok::<_, Error>(())
        })?;
        out.sync_all()?;
        Ok(hasher.finalize())
    }

    pub fn delete(&self, name: &str) -> Result<(), Error> {
        match self.runtime.block_on(self.store.delete(&self.key(name))) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;
    use std::io::Seek;

    fn stores() -> Vec<(Store, Option<tempfile::TempDir>)> {
        let dir = tempfile::tempdir().unwrap();
        let local = Store::open(&format!("file://{}/deep/er", dir.path().display())).unwrap();
        let memory = Store::new(Arc::new(InMemory::new()), Key::from("some/prefix")).unwrap();
        let mut stores = vec![(local, Some(dir)), (memory, None)];
        // A store that is there for tests, for example s3://bucket/prefix of a server that speaks S3.
        if let Ok(url) = std::env::var("UNISONO_TEST_STORE") {
            stores.push((Store::open(&format!("{url}/{}", std::process::id())).unwrap(), None));
        }
        stores
    }

    #[test]
    fn what_is_written_is_read_and_listed_and_a_name_is_created_once() {
        for (store, _dir) in stores() {
            let mut file = tempfile::tempfile().unwrap();
            let content: Vec<u8> = (0..PART as u32 + 12_345).map(|i| (i % 251) as u8).collect();
            file.write_all(&content).unwrap();
            file.rewind().unwrap();
            let (bytes, hash) = store.upload("run/step/big file", &mut file, |_| {}).unwrap();
            assert_eq!((bytes, hash), (content.len() as u64, blake3::hash(&content)));
            assert!(store.create("run/step/MANIFEST", b"first".to_vec()).unwrap());
            assert!(!store.create("run/step/MANIFEST", b"second".to_vec()).unwrap());
            assert_eq!(store.get("run/step/MANIFEST").unwrap(), b"first");
            let names: Vec<_> = store.list("run").unwrap().into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, ["run/step/MANIFEST", "run/step/big file"]);
            let to = tempfile::tempdir().unwrap();
            let hash = store.download("run/step/big file", &to.path().join("it")).unwrap();
            assert_eq!(hash, blake3::hash(&content));
            assert_eq!(std::fs::read(to.path().join("it")).unwrap(), content);
            store.delete("run/step/MANIFEST").unwrap();
            store.delete("run/step/MANIFEST").unwrap();
            assert_eq!(store.list("run/step").unwrap().len(), 1);
            assert!(store.get("run/step/MANIFEST").unwrap_err().is_absence());
        }
    }

    #[test]
    fn what_is_no_store_is_refused_with_a_remedy() {
        let sentence = |url: &str| Store::open(url).err().unwrap().to_string();
        assert!(sentence("runs/copies").contains("absolute path"));
        assert!(sentence("ftp://there").contains("only s3://"));
        #[cfg(not(feature = "stores"))]
        assert!(sentence("s3://bucket/x").contains("STORES=1"));
    }
}
