//! Text to tree.

use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, YamlData};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Entry, Node, Value};
use crate::{Place, Problem};

/// The formats a configuration may be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// TOML 1.0.
    Toml,
    /// YAML 1.2.
    Yaml,
    /// JSON.
    Json,
}

impl Format {
    /// The format a file name's extension stands for.
    pub fn of_extension(extension: &str) -> Option<Self> {
        match extension {
            "toml" => Some(Self::Toml),
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

pub(super) fn parse(text: &str, format: Format) -> Result<Node, Vec<Problem>> {
    match format {
        Format::Toml => toml(text),
        // JSON is YAML in flow style (YAML 1.2 section 1.3).
        Format::Yaml | Format::Json => yaml(text),
    }
}

fn toml(text: &str) -> Result<Node, Vec<Problem>> {
    let (document, errors) = DeTable::parse_recoverable(text);
    let lines = Lines::of(text);
    if !errors.is_empty() {
        let problem = |error: &toml::de::Error| {
            let place = error.span().map_or(Place::Nowhere, |span| lines.place(span.start));
            Problem::new(place, "", error.message())
        };
        return Err(errors.iter().map(problem).collect());
    }
    Ok(Node { place: Place::Nowhere, value: lines.table(document.get_ref()) })
}

/// Where the lines of a text end.
struct Lines(Vec<usize>);

impl Lines {
    fn of(text: &str) -> Self {
        Self(text.match_indices('\n').map(|(byte, _)| byte).collect())
    }

    fn place(&self, byte: usize) -> Place {
        Place::Line(self.0.partition_point(|end| *end < byte) + 1)
    }

    fn table(&self, table: &DeTable<'_>) -> Value {
        let entry = |(key, value): (&Spanned<_>, &Spanned<DeValue<'_>>)| Entry {
            key: std::borrow::Cow::<str>::to_string(key.get_ref()),
            place: self.place(key.span().start),
            node: self.value(value),
        };
        let mut entries: Vec<Entry> = table.iter().map(entry).collect();
        // The parser sorts by name; errors read better in the order of the file.
        entries.sort_by(|a, b| a.place.cmp(&b.place));
        Value::Map(entries)
    }

    fn value(&self, value: &Spanned<DeValue<'_>>) -> Node {
        let plain = |text: &str| Value::Text(text.to_owned());
        let place = self.place(value.span().start);
        let value = match value.get_ref() {
            DeValue::String(string) => plain(string),
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .map_or_else(|_| plain(number.as_str()), Value::Int),
            DeValue::Float(number) => {
                number.as_str().parse().map_or_else(|_| plain(number.as_str()), Value::Float)
            }
            DeValue::Boolean(value) => Value::Bool(*value),
            DeValue::Datetime(value) => Value::Text(value.to_string()),
            DeValue::Array(values) => {
                Value::List(values.iter().map(|value| self.value(value)).collect())
            }
            DeValue::Table(table) => self.table(table),
        };
        Node { place, value }
    }
}

fn yaml(text: &str) -> Result<Node, Vec<Problem>> {
    let mut documents = MarkedYaml::load_from_str(text).map_err(|error| {
        vec![Problem::new(Place::Line(error.marker().line()), "", error.info())]
    })?;
    match documents.len() {
        0 => Ok(Node { place: Place::Nowhere, value: Value::Map(Vec::new()) }),
        1 => Ok(yaml_node(&documents.remove(0))),
        _ => Err(vec![Problem::new(Place::Nowhere, "", "the file has more than one document")]),
    }
}

fn yaml_node(node: &MarkedYaml<'_>) -> Node {
    let value = match &node.data {
        YamlData::Value(scalar) => yaml_scalar(scalar),
        YamlData::Sequence(nodes) => Value::List(nodes.iter().map(yaml_node).collect()),
        YamlData::Mapping(map) => Value::Map(
            map.iter()
                .map(|(key, value)| Entry {
                    key: yaml_key(key),
                    place: Place::Line(key.span.start.line()),
                    node: yaml_node(value),
                })
                .collect(),
        ),
        YamlData::Tagged(_, inner) => return yaml_node(inner),
        YamlData::Representation(..) | YamlData::Alias(_) | YamlData::BadValue => Value::Null,
    };
    Node { place: Place::Line(node.span.start.line()), value }
}

fn yaml_scalar(scalar: &Scalar<'_>) -> Value {
    match scalar {
        Scalar::Null => Value::Null,
        Scalar::Boolean(value) => Value::Bool(*value),
        Scalar::Integer(number) => Value::Int(*number),
        Scalar::FloatingPoint(number) => Value::Float(number.into_inner()),
        Scalar::String(text) => Value::Text(text.to_string()),
    }
}

fn yaml_key(key: &MarkedYaml<'_>) -> String {
    match yaml_node(key).value {
        Value::Text(text) => text,
        Value::Int(number) => number.to_string(),
        Value::Bool(value) => value.to_string(),
        _ => "?".to_owned(),
    }
}
