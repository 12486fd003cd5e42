//! Files that take the places of those before them together, once all are complete.

use candle_core::{Device, Error, Result, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

const PREFIX: &str = ".saving-";
const LOCK: &str = "lock";
/// The last file of a commit as it was before.
const ASIDE: &str = "before";

/// A folder beside the files to be, where they are written first. It goes when this is dropped; what
/// a process that was killed has left is removed by the next.
pub(super) struct Staging {
    folder: PathBuf,
    temporary: PathBuf,
    /// Held as long as the folder is in use. Its permissions are those of any new file.
    lock: Option<File>,
}

impl Staging {
    /// For files in this folder, which is made if need be.
    pub fn new(folder: &Path) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        // A folder is not another thread's to remove before it is locked.
        static MAKING: Mutex<()> = Mutex::new(());
        let _making = MAKING.lock().unwrap_or_else(|e| e.into_inner());
        let folder = match folder.as_os_str().is_empty() {
            true => Path::new("."),
            false => folder,
        };
        let make = || -> std::io::Result<Self> {
            fs::create_dir_all(folder)?;
            remove_orphans(folder)?;
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("{PREFIX}{}-{count}", std::process::id());
            let temporary = folder.join(name);
            fs::create_dir(&temporary)?;
            let lock = File::create(temporary.join(LOCK))?;
            // A file system without locks keeps the orphans.
            let _ = lock.lock();
            Ok(Self {
                folder: folder.to_owned(),
                temporary,
                lock: Some(lock),
            })
        };
        make().map_err(|e| Error::from(e).with_path(folder))
    }

    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.temporary.join(name);
        fs::write(&path, text).map_err(|e| Error::from(e).with_path(self.folder.join(name)))
    }

    /// As safetensors.
    pub fn write_tensors<'a>(
        &self,
        name: &str,
        tensors: impl IntoIterator<Item = (String, &'a Tensor)>,
        metadata: Option<HashMap<String, String>>,
    ) -> Result<()> {
        // Writing reads a tensor's values without a way to fail, so they are fetched before.
        let tensors = tensors
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.contiguous()?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        safetensors::serialize_to_file(&tensors, metadata, &self.temporary.join(name))
            .map_err(|e| Error::wrap(e).with_path(self.folder.join(name)))
    }

    /// Puts the files in their places, in this order. The last tells how the others are read: where it
    /// is to change, the one before it is put aside first, so that it never stands beside files that
    /// it does not describe.
    pub fn commit(self, names: &[&str]) -> Result<()> {
        let place = || -> std::io::Result<()> {
            for name in names {
                let file = File::open(self.temporary.join(name))?;
                // safetensors keeps a file to its owner; this one is as readable as any other.
                if let Some(lock) = &self.lock {
                    file.set_permissions(lock.metadata()?.permissions())?;
                }
                file.sync_all()?;
            }
            for (from, to) in self.renames(names)? {
                fs::rename(from, to)?;
                sync(&self.folder)?;
            }
            Ok(())
        };
        place().map_err(|e| {
            // The first file did not get its place: all is as it was.
            let untouched = names
                .first()
                .is_some_and(|first| self.temporary.join(first).exists());
            if let (true, Some(last)) = (untouched, names.last()) {
                let _ = fs::rename(self.temporary.join(ASIDE), self.folder.join(last));
            }
            Error::from(e).with_path(&self.folder)
        })
    }

    /// What is renamed to what, one after the other.
    fn renames(&self, names: &[&str]) -> std::io::Result<Vec<(PathBuf, PathBuf)>> {
        let mut renames = Vec::new();
        if let [_, .., last] = names {
            let path = self.folder.join(last);
            let changes = match fs::read(&path) {
                Ok(before) => before != fs::read(self.temporary.join(last))?,
                Err(_) => false,
            };
            if changes {
                renames.push((path, self.temporary.join(ASIDE)));
            }
        }
        let into_place = |name: &&str| (self.temporary.join(name), self.folder.join(name));
        renames.extend(names.iter().map(into_place));
        Ok(renames)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Windows removes no open file.
        self.lock = None;
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

/// A new name is on the disk once its folder is.
fn sync(folder: &Path) -> std::io::Result<()> {
    // Windows cannot open a folder.
    match cfg!(unix) {
        true => File::open(folder)?.sync_all(),
        false => Ok(()),
    }
}

/// Removes the folders that nobody holds.
fn remove_orphans(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if !is_ours || !entry.file_type()?.is_dir() {
            continue;
        }
        let abandoned = match File::open(entry.path().join(LOCK)) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(e) => e.kind() == std::io::ErrorKind::NotFound,
        };
        if abandoned {
            // Another may be removing it too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(folder: &Path, name: &str) -> Option<String> {
        fs::read_to_string(folder.join(name)).ok()
    }

    /// Killed after any of its renames, a commit leaves the old pair, the new one, or no config.
    #[test]
    fn a_commit_that_is_cut_short_leaves_no_mix() -> std::io::Result<()> {
        let name = format!("cce-staging-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        let names = ["weights", "config"];
        for (before, seen) in [
            (Some("old"), vec!["old", "none", "none", "new"]),
            // The same config describes both.
            (Some("new"), vec!["new", "new", "new"]),
            (None, vec!["none", "none", "new"]),
        ] {
            for (cut, seen) in seen.iter().enumerate() {
                let _ = fs::remove_dir_all(&folder);
                let staging = Staging::new(&folder).map_err(std::io::Error::other)?;
                for name in names {
                    fs::write(staging.temporary.join(name), "new")?;
                    if let Some(before) = before {
                        fs::write(folder.join(name), before)?;
                    }
                }
                for (from, to) in staging.renames(&names)?.into_iter().take(cut) {
                    fs::rename(from, to)?;
                }
                let config = read(&folder, "config");
                assert_eq!(
                    config.as_deref().unwrap_or("none"),
                    *seen,
                    "{before:?} {cut}"
                );
                if let Some(config) = config {
                    assert_eq!(Some(config), read(&folder, "weights"), "{before:?} {cut}");
                }
            }
        }
        fs::remove_dir_all(&folder)
    }
}
