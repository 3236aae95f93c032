//! Files that are whole or not there: each is written beside its place and then moved there.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::Error;

/// Symbolic links that are followed one after the other, as Linux does.
const MOST_LINKS: usize = 40;
/// Characters of a file's name that the one beside it begins with: both have to fit what the system allows.
const NAME: usize = 40;

/// Writes a file beside its place and moves it there.
pub(crate) fn write_file(
    path: &Path,
    contents: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), Error> {
    let mut file = NewFile::beside(path)?;
    contents(file.file.as_file_mut()).map_err(Error::io(path))?;
    file.put()
}

/// A file beside the place that it will have. Its name is that of the other between a dot and six random
/// characters with the end `.tmp`. If the program is killed it stays; nobody removes it, since it may be that of
/// another program that writes the same file now.
pub(crate) struct NewFile<'a> {
    file: NamedTempFile,
    /// What the caller calls its place.
    path: &'a Path,
    /// What that is a link to, or the same.
    place: PathBuf,
}

impl<'a> NewFile<'a> {
    /// An empty one, with the permissions of any new file.
    ///
    /// # Errors
    /// [`Error::File`] if there is something else than a regular file, [`Error::Io`] if no file can be made there.
    pub(crate) fn beside(path: &'a Path) -> Result<Self, Error> {
        let place = place_of(path)?;
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let prefix: String =
            ".".chars().chain(name.chars().take(NAME)).chain(".".chars()).collect();
        // Errors of the library's own way to open would name this file, of which the caller knows nothing.
        let open = |path: &Path| File::options().read(true).write(true).create_new(true).open(path);
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix(&prefix).suffix(".tmp");
        let file = builder.make_in(folder_of(&place), open).map_err(Error::io(path))?;
        Ok(Self { file, path, place })
    }

    /// Where it is now.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// What it is, as long as nobody puts another file there.
    pub(crate) fn file(&self) -> &File {
        self.file.as_file()
    }

    /// Moves it to its place, once it is written.
    ///
    /// # Errors
    /// [`Error::Io`] if that cannot be done.
    pub(crate) fn put(self) -> Result<(), Error> {
        let Self { file, path, place } = self;
        // By its name: another may have taken the place of the one that was opened.
        File::open(file.path()).and_then(|file| file.sync_all()).map_err(Error::io(path))?;
        file.persist(&place).map_err(|error| Error::io(path)(error.error))?;
        // The new name is on the disk when its folder is; not every system can do that.
        let _ = File::open(folder_of(&place)).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

/// Where a file called `path` is: what it is a symbolic link to, or the same. There may be none yet.
fn place_of(path: &Path) -> Result<PathBuf, Error> {
    let mut place = path.to_owned();
    for _ in 0..=MOST_LINKS {
        match fs::symlink_metadata(&place) {
            Ok(found) if found.is_symlink() => {
                let target = fs::read_link(&place).map_err(Error::io(path))?;
                place = folder_of(&place).join(target);
            }
            Ok(found) if !found.is_file() => {
                let what = if found.is_dir() { "a folder" } else { "not a regular file" };
                let what = format!("it is {what}, which is not replaced: choose another name");
                return Err(Error::file(path, what));
            }
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::io(path)(error));
            }
            _ => return Ok(place),
        }
    }
    Err(Error::file(path, "too many symbolic links one after the other"))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::Write;
    use std::os::unix::fs::{FileTypeExt, symlink};
    use std::process::Command;

    use super::*;

    fn write(path: &Path, text: &str) -> Result<(), Error> {
        write_file(path, |file| file.write_all(text.as_bytes()))
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = write(&path, "x").unwrap_err().to_string();
        assert!(error.contains("pipe: it is not a regular file"), "{error}");
        assert!(fs::symlink_metadata(&path).unwrap().file_type().is_fifo());
        let error = write(folder.path(), "x").unwrap_err().to_string();
        assert!(error.contains("it is a folder"), "{error}");
        // Nor through a link.
        let link = folder.path().join("link");
        symlink("pipe", &link).unwrap();
        let error = write(&link, "x").unwrap_err().to_string();
        assert!(error.contains("link: it is not a regular file"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn links_are_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("elsewhere")).unwrap();
        // A link to a link, relative to its own folder, to a file that is not there at first.
        symlink("elsewhere/second", path("first")).unwrap();
        symlink("file", path("elsewhere/second")).unwrap();
        for text in ["old", "new"] {
            write(&path("first"), text).unwrap();
            assert_eq!(fs::read_to_string(path("elsewhere/file")).unwrap(), text);
        }
        assert!(fs::symlink_metadata(path("first")).unwrap().is_symlink());
        assert!(fs::symlink_metadata(path("elsewhere/second")).unwrap().is_symlink());
        symlink("loop", path("loop")).unwrap();
        let error = write(&path("loop"), "").unwrap_err().to_string();
        assert!(error.contains("loop: too many symbolic links"), "{error}");
    }

    #[test]
    fn the_file_beside_is_known_by_its_name_and_not_named_in_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let name = NewFile::beside(&path).unwrap().path().file_name().unwrap().to_owned();
        let name = name.into_string().unwrap();
        assert!(name.starts_with(".model.safetensors.") && name.ends_with(".tmp"), "{name}");
        // The longest name that there may be.
        write(&folder.path().join("\u{e4}".repeat(127)), "x").unwrap();
        let error = write(&folder.path().join("none/x.gguf"), "x").unwrap_err();
        let reason = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.to_string().ends_with("none/x.gguf") && !reason.contains(".tmp"), "{reason}");
    }
}
