//! The tidy check: which crate may name which, `unsafe` only where allowed, no `unwrap` outside tests, no
//! dead files, no unfinished marks, and names in the documents that exist.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

/// What each package may depend on, of ours and of what only one may name.
const ARROWS: &[(&str, &[&str])] = &[
    ("dataplane/rt", &["monoio", "io-uring"]),
    ("dataplane/proto", &[]),
    ("dataplane/api", &["culvert-proto"]),
    ("dataplane/link", &["culvert-api"]),
    ("dataplane", &["culvert-api", "culvert-link", "culvert-proto", "culvert-rt"]),
    ("controlplane", &["culvert-api", "culvert-link"]),
    (
        "benches",
        &["culvert", "culvert-api", "culvert-proto", "culvert-rt", "monoio", "tokio-uring"],
    ),
    ("perf", &["culvert-api", "culvert-link", "culvert-proto", "monoio", "io-uring"]),
    ("scripts/xtask", &[]),
];

/// Packages whose use is restricted by [`ARROWS`].
const RESTRICTED: [&str; 8] = [
    "culvert",
    "culvert-api",
    "culvert-link",
    "culvert-proto",
    "culvert-rt",
    "monoio",
    "io-uring",
    "tokio-uring",
];

/// Where `unsafe` may stand.
const UNSAFE: [&str; 3] = ["dataplane/rt/src/", "dataplane/src/ledger/", "perf/src/process.rs"];

/// Folders that nothing may do IO in, with what would betray it.
const PURE: [(&str, &[&str]); 2] = [
    ("dataplane/proto/src/", &["std::fs", "std::io", "TcpStream", "Instant::now", "SystemTime"]),
    ("dataplane/api/src/", &["std::fs", "std::io", "TcpStream", "Instant::now", "SystemTime"]),
];

/// Top-level folders.
const FOLDERS: [&str; 9] = [
    "dataplane",
    "controlplane",
    "benches",
    "perf",
    "scripts",
    "systemd",
    ".ci",
    ".github",
    ".cargo",
];

pub(crate) fn run() -> anyhow::Result<()> {
    let tidy = Tidy { files: tracked()?, problems: Vec::new() };
    let problems = tidy.check()?;
    for problem in &problems {
        eprintln!("tidy: {problem}");
    }
    anyhow::ensure!(problems.is_empty(), "{} problems", problems.len());
    println!("tidy: ok");
    Ok(())
}

/// Files git knows, and those it would take.
fn tracked() -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .output()
        .context("git ls-files")?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(PathBuf::from).filter(|path| path.exists()).collect())
}

struct Tidy {
    files: Vec<PathBuf>,
    problems: Vec<String>,
}

impl Tidy {
    fn check(mut self) -> anyhow::Result<Vec<String>> {
        self.folders();
        self.arrows()?;
        for path in self.files.clone() {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("rs") => self.source(&path)?,
                Some("md") => self.document(&path)?,
                _ => {}
            }
        }
        self.dead_files()?;
        Ok(self.problems)
    }

    fn problem(&mut self, place: &Path, message: impl AsRef<str>) {
        self.problems.push(format!("{}: {}", place.display(), message.as_ref()));
    }

    fn folders(&mut self) {
        let folders: BTreeSet<String> = self
            .files
            .iter()
            .filter(|path| path.components().count() > 1)
            .filter_map(|path| Some(path.components().next()?.as_os_str().to_str()?.to_owned()))
            .collect();
        for folder in folders.iter().filter(|folder| !FOLDERS.contains(&folder.as_str())) {
            self.problem(Path::new(folder), "no such top-level folder in the layout");
        }
    }

    fn arrows(&mut self) -> anyhow::Result<()> {
        for (folder, allowed) in ARROWS {
            let path = Path::new(folder).join("Cargo.toml");
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let mut section = "";
            for line in text.lines() {
                if line.starts_with('[') {
                    section = line;
                }
                let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
                // Tests may look from outside at what the library may not know.
                let counts = section == "[dependencies]" && RESTRICTED.contains(&name);
                if counts && !allowed.contains(&name) {
                    self.problem(&path, format!("must not depend on {name}"));
                }
            }
        }
        Ok(())
    }

    fn source(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = fs::read_to_string(path)?;
        let name = path.to_string_lossy().into_owned();
        let is_test =
            name.contains("/tests/") || name.ends_with("/tests.rs") || name.contains("/fuzz/");
        let tidy_itself = name.ends_with("tidy.rs");
        let mut in_tests = is_test;
        for (number, line) in text.lines().enumerate() {
            let here = PathBuf::from(format!("{name}:{}", number + 1));
            let code = line.split("//").next().unwrap_or_default();
            // A test module stands at the end of its file.
            in_tests |= line.trim() == "#[cfg(test)]";
            if !in_tests && !tidy_itself && code.contains(".unwrap()") {
                self.problem(&here, "unwrap outside tests; say with expect what it relies on");
            }
            let is_unsafe = code.contains("unsafe ") && !code.contains("unsafe_code");
            if is_unsafe && !tidy_itself && !UNSAFE.iter().any(|place| name.starts_with(place)) {
                self.problem(&here, "unsafe is for rt and ledger only");
            }
            for (folder, words) in PURE {
                let word = words.iter().find(|word| code.contains(**word));
                if let (true, false, Some(word)) = (name.starts_with(folder), in_tests, word) {
                    self.problem(&here, format!("{folder} does no IO and knows no clock: {word}"));
                }
            }
            for mark in ["TODO", "FIXME", "XXX", "HACK", "todo!(", "unimplemented!(", "#[ignore"] {
                if !tidy_itself && line.contains(mark) {
                    self.problem(&here, format!("unfinished: {mark}"));
                }
            }
        }
        if name.ends_with("/mod.rs") {
            self.problem(path, "name the file after its module, not mod.rs");
        }
        Ok(())
    }

    /// Paths and names in backticks must exist: `dataplane/src/node.rs`, `policy::authorize`.
    fn document(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = fs::read_to_string(path)?;
        let sources: Vec<String> = self
            .files
            .iter()
            .filter(|file| file.extension().is_some_and(|extension| extension == "rs"))
            .filter_map(|file| fs::read_to_string(file).ok())
            .collect();
        for (number, line) in text.lines().enumerate() {
            for quoted in line.split('`').skip(1).step_by(2) {
                let here = PathBuf::from(format!("{}:{}", path.display(), number + 1));
                let first = quoted.split('/').next().unwrap_or_default();
                if quoted.contains('/')
                    && FOLDERS.contains(&first)
                    && !quoted.contains([' ', '*', '<'])
                {
                    let exists = Path::new(quoted.trim_end_matches('/')).exists();
                    if !exists {
                        self.problem(&here, format!("there is no {quoted}"));
                    }
                }
                let is_name = quoted.contains("::")
                    && quoted.chars().all(|c| c.is_alphanumeric() || c == ':' || c == '_');
                if is_name {
                    let last = quoted.rsplit("::").next().unwrap_or_default();
                    if !sources.iter().any(|source| source.contains(last)) {
                        self.problem(&here, format!("nothing is named {quoted}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Every source file is some module, example or test.
    fn dead_files(&mut self) -> anyhow::Result<()> {
        let sources: Vec<PathBuf> = self
            .files
            .iter()
            .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
            .cloned()
            .collect();
        for path in &sources {
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let folder = path.parent().unwrap_or(Path::new(""));
            let root = matches!(stem, "main" | "lib" | "build")
                || folder.ends_with("tests")
                || folder.ends_with("benches")
                || folder.ends_with("fuzz_targets");
            if root {
                continue;
            }
            let declared = |parent: &Path| {
                fs::read_to_string(parent).is_ok_and(|text| {
                    text.lines().any(|line| {
                        let line = line
                            .trim()
                            .trim_start_matches("pub ")
                            .trim_start_matches("pub(crate) ");
                        line == format!("mod {stem};")
                    })
                })
            };
            let parents =
                [folder.with_extension("rs"), folder.join("main.rs"), folder.join("lib.rs")];
            if !parents.iter().any(|parent| declared(parent)) {
                self.problem(path, "no module declares this file");
            }
        }
        Ok(())
    }
}
