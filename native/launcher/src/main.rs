//! `containerd-shim-kata-hybrid-v2`: what containerd executes.
//!
//! It replaces itself by the interpreter that stands beside it, running the shim's package from
//! the same installation. It parses nothing but `-v`: the command line is the package's business.
//! The interpreter runs isolated and without its `site` module, which takes longer than the short
//! actions; the package loads `site` itself where it needs installed libraries.

mod install;

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use install::{Installation, find_installation};

const NAME: &str = env!("CARGO_BIN_NAME");

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    if arguments.iter().any(|word| is_version_flag(word)) {
        let text = format!("{NAME}: version {}\n", env!("CARGO_PKG_VERSION"));
        return match io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let message = launch(&arguments);
    // There is nobody to tell if this fails too.
    let _ = writeln!(io::stderr(), "{NAME}: {message}");
    ExitCode::FAILURE
}

/// Becomes the interpreter; returns only to say why that failed.
fn launch(arguments: &[OsString]) -> String {
    let executable = match env::current_exe() {
        Ok(path) => path,
        Err(error) => return format!("find own executable: {error}"),
    };
    let folder = executable.parent().unwrap_or(Path::new("/"));
    let installation = match find_installation(folder) {
        Ok(found) => found,
        Err(error) => return error.to_string(),
    };
    let mut command = interpreter(&installation);
    let error = command.args(arguments).exec();
    format!("execute {}: {error}", installation.python.display())
}

fn interpreter(installation: &Installation) -> Command {
    let mut command = Command::new(&installation.python);
    match &installation.main {
        Some(main) => command
            .args(["-I", "-S", "-X", "frozen_modules=on"])
            .arg(main),
        // Installed in a way only the interpreter's own import system understands.
        None => command.args(["-I", "-m", "kata_hybrid.shim"]),
    };
    command
}

/// No other argument can look like this: ids and paths do not begin with a dash.
fn is_version_flag(word: &OsStr) -> bool {
    matches!(word.to_str(), Some("-v" | "--v" | "-version" | "--version"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_dash_forms_ask_for_the_version() {
        for word in ["-v", "--v", "-version", "--version"] {
            assert!(is_version_flag(OsStr::new(word)), "{word}");
        }
        assert!(!is_version_flag(OsStr::new("-verbose")));
    }

    #[test]
    fn a_found_package_runs_without_site() {
        let installation = Installation {
            python: "/opt/x/bin/python3".into(),
            main: Some("/opt/x/lib/main.py".into()),
        };
        let command = interpreter(&installation);
        let words: Vec<&OsStr> = command.get_args().collect();
        assert_eq!(
            words,
            ["-I", "-S", "-X", "frozen_modules=on", "/opt/x/lib/main.py"]
        );
    }
}
