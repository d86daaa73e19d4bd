//! Configuration text in TOML, YAML or JSON as one kind of tree, and trees as typed values.
//!
//! Every value knows its line, so an error can name it; a mistake does not hide the next one, so
//! [`Tree::read`] returns all of them.

mod parse;
mod read;

pub use parse::Format;

use crate::{Place, Problem};

/// A configuration before it has types.
#[derive(Debug, Clone, PartialEq)]
pub struct Tree {
    root: Node,
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) place: Place,
    pub(crate) node: Node,
}

impl Value {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a boolean",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a table",
        }
    }
}

impl Tree {
    /// An empty configuration.
    pub fn empty() -> Self {
        Self { root: Node { place: Place::Nowhere, value: Value::Map(Vec::new()) } }
    }

    /// Parses configuration text.
    ///
    /// # Errors
    /// The text is not in the format; with the lines.
    pub fn parse(text: &str, format: Format) -> Result<Self, Vec<Problem>> {
        parse::parse(text, format).map(|root| Self { root })
    }

    /// Lays environment variables over the file: `<PREFIX>_<SECTION>_<KEY>` sets `section.key`.
    /// Sections have no underscore in their names, so the first one ends them. Returns a problem for
    /// each variable that names no key at all.
    pub fn overlay(
        &mut self,
        prefix: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (name, text) in variables {
            let Some(rest) = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('_'))
            else {
                continue;
            };
            let path = rest.to_ascii_lowercase();
            match path.split_once('_') {
                Some((section, _)) if self.is_list(section) => problems.push(Problem::new(
                    Place::Variable(name),
                    "",
                    "lists are set in the file only",
                )),
                Some((section, key)) if !section.is_empty() && !key.is_empty() => {
                    self.set(&[section, key], text, Place::Variable(name));
                }
                _ => problems.push(Problem::new(
                    Place::Variable(name),
                    "",
                    format!("environment variables are named {prefix}_<SECTION>_<KEY>"),
                )),
            }
        }
        problems
    }

    /// Lays flags over all else: `section.key=value`. Returns a problem for each that names no key.
    pub fn overlay_flags(&mut self, flags: &[String]) -> Vec<Problem> {
        let mut problems = Vec::new();
        for flag in flags {
            let place = || Place::Flag(format!("--set {flag}"));
            let named = flag.split_once('=').and_then(|(path, text)| {
                let (section, key) = path.split_once('.')?;
                let is_key = !section.is_empty() && !key.is_empty() && !key.contains('.');
                is_key.then_some((section, key, text))
            });
            let wrong = match named {
                Some((section, ..)) if self.is_list(section) => "lists are set in the file only",
                Some((section, key, text)) => {
                    self.set(&[section, key], text.to_owned(), place());
                    continue;
                }
                None => "write --set section.key=value",
            };
            problems.push(Problem::new(place(), "", wrong));
        }
        problems
    }

    fn is_list(&self, section: &str) -> bool {
        let entry = self.root.entry(section);
        entry.is_some_and(|entry| matches!(entry.node.value, Value::List(_)))
    }

    /// Sets one value, as a flag or a variable does.
    pub fn set(&mut self, path: &[&str], text: String, place: Place) {
        let mut node = &mut self.root;
        for key in path {
            if !matches!(node.value, Value::Map(_)) {
                node.value = Value::Map(Vec::new());
            }
            let Value::Map(entries) = &mut node.value else { return };
            let at = entries.iter().position(|entry| entry.key == *key).unwrap_or_else(|| {
                let node = Node { place: place.clone(), value: Value::Null };
                entries.push(Entry { key: (*key).to_owned(), place: place.clone(), node });
                entries.len() - 1
            });
            node = &mut entries[at].node;
        }
        *node = Node { place, value: Value::Text(text) };
    }

    /// Whether a top-level section is there.
    pub fn has(&self, section: &str) -> bool {
        self.root.entry(section).is_some()
    }

    /// Where a key stands, given its path as in [`Problem::key`]; the nearest parent that is there.
    pub fn place(&self, key: &str) -> Place {
        let mut node = &self.root;
        let mut place = Place::Nowhere;
        for step in key.split(['.', '[']).filter(|step| !step.is_empty()) {
            let next = match step.strip_suffix(']').map(str::parse::<usize>) {
                Some(Ok(index)) => match &node.value {
                    Value::List(nodes) => nodes.get(index).map(|node| (&node.place, node)),
                    _ => None,
                },
                _ => node.entry(step).map(|entry| (&entry.place, &entry.node)),
            };
            let Some((found, inner)) = next else { break };
            (place, node) = (found.clone(), inner);
        }
        place
    }

    /// Reads the tree as a value.
    ///
    /// # Errors
    /// All problems found, in the order of their lines: unknown keys (with the nearest known one),
    /// wrong types, bad values, missing keys.
    pub fn read<T: serde::de::DeserializeOwned>(&self) -> Result<T, Vec<Problem>> {
        read::read(&self.root)
    }
}

impl Node {
    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;
    use crate::Span;

    #[derive(Debug, Deserialize, PartialEq, Default)]
    #[serde(default, deny_unknown_fields)]
    struct File {
        node: NodeSection,
        listener: Vec<Listener>,
        map: BTreeMap<String, u32>,
    }

    #[derive(Debug, Deserialize, PartialEq, Default)]
    #[serde(default, deny_unknown_fields)]
    struct NodeSection {
        name: String,
        workers: Option<u32>,
        idle: Span,
        quick: bool,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Listener {
        bind: String,
        #[serde(default)]
        ports: Vec<u16>,
    }

    const TOML: &str = "[node]\nname = 'a'\nworkers = 2\nidle = '10s'\nquick = true\n\n\
        [[listener]]\nbind = 'x'\nports = [1, 2]\n[map]\nk = 3\n";
    const YAML: &str = "node:\n  name: a\n  workers: 2\n  idle: 10s\n  quick: true\n\
        listener:\n  - bind: x\n    ports: [1, 2]\nmap:\n  k: 3\n";
    const JSON: &str = r#"{"node": {"name": "a", "workers": 2, "idle": "10s", "quick": true},
        "listener": [{"bind": "x", "ports": [1, 2]}], "map": {"k": 3}}"#;

    fn read(text: &str, format: Format) -> Result<File, Vec<String>> {
        let texts = |problems: Vec<Problem>| problems.iter().map(Problem::to_string).collect();
        Tree::parse(text, format).and_then(|tree| tree.read()).map_err(texts)
    }

    #[test]
    fn three_formats_read_the_same() {
        let toml: File = read(TOML, Format::Toml).unwrap();
        assert_eq!(toml.listener[0].ports, [1, 2]);
        assert_eq!(read(YAML, Format::Yaml).unwrap(), toml);
        assert_eq!(read(JSON, Format::Json).unwrap(), toml);
    }

    #[test]
    fn every_problem_is_told_with_its_line() {
        let text = "[node]\nnmae = 'a'\nworkers = 'two'\nidle = 'soon'\n[[listener]]\nports = [70000]\n\
            [[listener]]\nbind = 'x'\nextra = 1\n[surprise]\n";
        let problems = read(text, Format::Toml).unwrap_err();
        let expected = [
            "line 2: node.nmae: unknown key; did you mean `name`?",
            "line 3: node.workers: ",
            "line 4: node.idle: `soon` is not a span of time such as \"10s\" or \"5m\"",
            "line 5: listener[0]: missing key `bind`",
            "line 6: listener[0].ports[0]: ",
            "line 9: listener[1].extra: unknown key; ",
            "line 10: surprise: unknown key; ",
        ];
        for (problem, start) in problems.iter().zip(expected) {
            assert!(problem.starts_with(start), "{problem:?} should start with {start:?}");
        }
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    }

    #[test]
    fn yaml_and_json_problems_have_lines_too() {
        let problems = read("node:\n  nmae: a\n", Format::Yaml).unwrap_err();
        assert_eq!(problems, ["line 2: node.nmae: unknown key; did you mean `name`?"]);
        let problems = read("{\"node\":\n {\"workers\": -1}}", Format::Json).unwrap_err();
        assert!(problems[0].starts_with("line 2: node.workers: "), "{problems:?}");
        assert!(read("{\"node\": }", Format::Json).unwrap_err()[0].starts_with("line 1: "));
        assert!(read("node: [", Format::Yaml).unwrap_err()[0].starts_with("line "));
        assert!(read("a = \n", Format::Toml).unwrap_err()[0].starts_with("line 1: "));
    }

    #[test]
    fn variables_lie_over_the_file() {
        let mut tree = Tree::parse(TOML, Format::Toml).unwrap();
        let problems = tree.overlay(
            "CULVERT",
            [
                ("CULVERT_NODE_WORKERS".into(), "4".into()),
                ("CULVERT_NODE_QUICK".into(), "false".into()),
                ("CULVERT_NODE".into(), "x".into()),
                ("HOME".into(), "/".into()),
            ],
        );
        assert_eq!(problems.len(), 1);
        let file: File = tree.read().unwrap();
        assert_eq!((file.node.workers, file.node.quick), (Some(4), false));
        tree.overlay("CULVERT", [("CULVERT_NODE_WORKRES".into(), "4".into())]);
        let problems = tree.read::<File>().unwrap_err();
        assert_eq!(
            problems[0].to_string(),
            "CULVERT_NODE_WORKRES: node.workres: unknown key; did you mean `workers`?"
        );
    }

    #[test]
    fn reading_takes_time_by_the_length_alone() {
        let time = |listeners: usize| {
            let text = TOML.replace("[map]", &"[[listener]]\nbind = 'y'\n".repeat(listeners));
            let started = std::time::Instant::now();
            let tree = Tree::parse(&text.replace("k = 3", ""), Format::Toml).unwrap();
            assert_eq!(tree.read::<File>().unwrap().listener.len(), listeners + 1);
            started.elapsed()
        };
        let (short, long) = (time(2_000), time(40_000));
        assert!(long < short * 100, "20 times the text took {short:?} and {long:?}");
    }

    #[test]
    fn places_are_found_by_key() {
        let tree = Tree::parse(TOML, Format::Toml).unwrap();
        assert_eq!(tree.place("node.workers"), Place::Line(3));
        assert_eq!(tree.place("listener[0].bind"), Place::Line(8));
        assert_eq!(tree.place("listener[0].absent"), Place::Line(7));
        assert_eq!(tree.place("absent"), Place::Nowhere);
    }
}
