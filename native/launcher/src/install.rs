//! Where the interpreter and the package are: found from the launcher's own folder.
//!
//! An installer puts the launcher and the interpreter into `<prefix>/bin` and the package into
//! `<prefix>/lib/python3.*/site-packages` (Debian: `dist-packages`). A development installation
//! has a `.pth` file there instead, naming the folder that holds the package.

use std::error::Error;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

const PACKAGE_MAIN: &str = "kata_hybrid/shim/__main__.py";
const INTERPRETER: &str = "python3";
const PACKAGE_FOLDERS: [&str; 2] = ["site-packages", "dist-packages"];

/// What to execute.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Installation {
    /// The interpreter.
    pub(crate) python: PathBuf,
    /// The package's entry file, unless only the interpreter can find it.
    pub(crate) main: Option<PathBuf>,
}

/// Neither interpreter nor package stand where an installer puts them.
#[derive(Debug)]
pub(crate) struct InstallError {
    interpreter: PathBuf,
}

impl fmt::Display for InstallError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "no Python interpreter at {}: this program belongs beside the {INTERPRETER} of the \
             environment that the kata-hybrid package is installed in; link to it rather than copy it",
            self.interpreter.display()
        )
    }
}

impl Error for InstallError {}

/// Looks from `folder`, where the launcher is.
pub(crate) fn find_installation(folder: &Path) -> Result<Installation, InstallError> {
    let python = folder.join(INTERPRETER);
    if !python.is_file() {
        return Err(InstallError {
            interpreter: python,
        });
    }
    let main = folder.parent().and_then(find_main);
    Ok(Installation { python, main })
}

fn find_main(prefix: &Path) -> Option<PathBuf> {
    let library = fs::read_dir(prefix.join("lib")).ok()?;
    let mut versions: Vec<PathBuf> = library
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path())
        .collect();
    versions.sort();
    versions
        .iter()
        .flat_map(|version| PACKAGE_FOLDERS.map(|name| version.join(name)))
        .find_map(|packages| main_below(&packages).or_else(|| main_by_link(&packages)))
}

fn main_below(folder: &Path) -> Option<PathBuf> {
    let main = folder.join(PACKAGE_MAIN);
    main.is_file().then_some(main)
}

/// Follows a development installation's `.pth` file.
fn main_by_link(packages: &Path) -> Option<PathBuf> {
    let link = fs::read_to_string(packages.join("kata_hybrid.pth")).ok()?;
    link.lines()
        .map(Path::new)
        .filter(|line| line.is_absolute())
        .find_map(main_below)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process;
    use std::sync::atomic::{AtomicU32, Ordering};

    static NEXT: AtomicU32 = AtomicU32::new(0);

    /// A prefix of its own, removed at the end.
    struct Prefix(PathBuf);

    impl Prefix {
        fn new() -> Self {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("launcher-{}-{number}", process::id()));
            fs::create_dir_all(path.join("bin")).unwrap();
            Self(path)
        }

        fn touch(&self, name: &str, content: &str) -> PathBuf {
            let path = self.0.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            path
        }
    }

    impl Drop for Prefix {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn an_installed_package_is_found() {
        let prefix = Prefix::new();
        let python = prefix.touch("bin/python3", "");
        let main = prefix.touch(
            "lib/python3.13/site-packages/kata_hybrid/shim/__main__.py",
            "",
        );
        let found = find_installation(&prefix.0.join("bin")).unwrap();
        assert_eq!(
            found,
            Installation {
                python,
                main: Some(main)
            }
        );
    }

    #[test]
    fn a_development_installation_is_followed() {
        let prefix = Prefix::new();
        prefix.touch("bin/python3", "");
        let main = prefix.touch("source/kata_hybrid/shim/__main__.py", "");
        let source = prefix.0.join("source");
        prefix.touch(
            "lib/python3.11/site-packages/kata_hybrid.pth",
            &format!("{}\n", source.display()),
        );
        let found = find_installation(&prefix.0.join("bin")).unwrap();
        assert_eq!(found.main, Some(main));
    }

    #[test]
    fn a_package_elsewhere_is_left_to_the_interpreter() {
        let prefix = Prefix::new();
        prefix.touch("bin/python3", "");
        let found = find_installation(&prefix.0.join("bin")).unwrap();
        assert_eq!(found.main, None);
    }

    #[test]
    fn a_missing_interpreter_is_named() {
        let prefix = Prefix::new();
        let error = find_installation(&prefix.0.join("bin")).unwrap_err();
        assert!(error.to_string().contains("bin/python3"), "{error}");
    }
}
