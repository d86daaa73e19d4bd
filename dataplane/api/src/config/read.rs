//! Tree to typed value: a serde deserializer that goes on after a mistake.
//!
//! Unknown keys are noted and skipped. Any other error names the node it is about; that node is then
//! taken out of the tree and the rest is read again, until nothing is wrong or the root is.

use std::{cell::RefCell, fmt};

use serde::{
    de::{
        DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer,
        MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor, value::StrDeserializer,
    },
    forward_to_deserialize_any,
};

use super::{Entry, Node, Value};
use crate::{Place, Problem};

/// Problems told of one file at the most.
const PROBLEMS_MAX: usize = 100;

pub(super) fn read<T: DeserializeOwned>(root: &Node) -> Result<T, Vec<Problem>> {
    let mut root = root.clone();
    let mut problems = Vec::new();
    let mut removed: Vec<String> = Vec::new();
    let value = loop {
        let unknown = RefCell::new(Vec::new());
        let path = Path { steps: Vec::new() };
        let result = T::deserialize(Reader { node: &root, path: &path, unknown: &unknown });
        // Each pass meets the same unknown keys again, and those behind the last mistake.
        for problem in unknown.into_inner() {
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
        match result {
            Ok(value) => break Some(value),
            Err(fault) => {
                let steps = fault.steps.unwrap_or_default();
                let key = Path { steps: steps.clone() }.to_string();
                // A value that could not be read is not missing as well.
                let missing = fault.message.strip_prefix("missing key `");
                let missing = missing.and_then(|rest| rest.strip_suffix('`'));
                if !missing.is_some_and(|name| removed.contains(&format!("{key}.{name}"))) {
                    problems.push(Problem::new(fault.place, key.clone(), plain(&fault.message)));
                }
                removed.push(key);
                if steps.is_empty() || problems.len() >= PROBLEMS_MAX || !remove(&mut root, &steps)
                {
                    break None;
                }
            }
        }
    };
    problems.sort();
    match value {
        Some(value) if problems.is_empty() => Ok(value),
        _ => Err(problems),
    }
}

/// Messages of others in words an operator knows.
fn plain(message: &str) -> String {
    const WORDS: [(&str, &str); 8] = [
        ("expected u16", "expected a whole number up to 65535"),
        ("expected u32", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected a sequence", "expected a list, such as [\"a\", \"b\"] or [[table]]"),
        ("expected a string", "expected text in quotes"),
        ("invalid socket address syntax", "not an address with a port, such as \"127.0.0.1:1082\""),
        ("invalid IP address syntax", "not a network, such as \"10.0.0.0/8\" or \"192.0.2.7/32\""),
        ("expected struct", "expected a table:"),
    ];
    WORDS.iter().fold(message.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Key(String),
    /// The element's position in the file, which stays when an element before it is taken out.
    Index(usize),
}

struct Path {
    steps: Vec<Step>,
}

impl Path {
    fn with(&self, step: Step) -> Self {
        let mut steps = self.steps.clone();
        steps.push(step);
        Self { steps }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, step) in self.steps.iter().enumerate() {
            match step {
                Step::Key(key) if i == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// Takes a faulty value out. A list element is emptied to null, which lists skip, so that the others
/// keep their numbers.
fn remove(root: &mut Node, steps: &[Step]) -> bool {
    let Some((last, parents)) = steps.split_last() else { return false };
    let mut node = root;
    for step in parents {
        let next = match (&mut node.value, step) {
            (Value::Map(entries), Step::Key(key)) => {
                entries.iter_mut().find(|entry| entry.key == *key).map(|entry| &mut entry.node)
            }
            (Value::List(nodes), Step::Index(index)) => nodes.get_mut(*index),
            _ => None,
        };
        let Some(next) = next else { return false };
        node = next;
    }
    match (&mut node.value, last) {
        (Value::Map(entries), Step::Key(key)) => {
            let before = entries.len();
            entries.retain(|entry| entry.key != *key);
            entries.len() < before
        }
        (Value::List(nodes), Step::Index(index)) => match nodes.get_mut(*index) {
            Some(node) if node.value != Value::Null => {
                node.value = Value::Null;
                true
            }
            _ => false,
        },
        _ => false,
    }
}

/// An error, and as soon as it is known the node it is about.
#[derive(Debug)]
struct Fault {
    message: String,
    place: Place,
    steps: Option<Vec<Step>>,
}

impl Fault {
    fn at(mut self, path: &Path, place: &Place) -> Self {
        if self.steps.is_none() {
            self.steps = Some(path.steps.clone());
            self.place = place.clone();
        }
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl serde::de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { message: message.to_string(), place: Place::Nowhere, steps: None }
    }

    fn missing_field(field: &'static str) -> Self {
        Self::custom(format_args!("missing key `{field}`"))
    }
}

#[derive(Clone, Copy)]
struct Reader<'a> {
    node: &'a Node,
    path: &'a Path,
    unknown: &'a RefCell<Vec<Problem>>,
}

impl<'a> Reader<'a> {
    fn fault(&self, fault: Fault) -> Fault {
        fault.at(self.path, &self.node.place)
    }

    fn wrong<'de, V: Visitor<'de>>(&self, visitor: &V) -> Fault {
        let unexpected = Unexpected::Other(self.node.value.kind());
        self.fault(Fault::invalid_type(unexpected, visitor))
    }

    /// Text from a variable or a flag stands for whatever type is asked for.
    fn outside(&self) -> Option<&'a str> {
        match (&self.node.place, &self.node.value) {
            (Place::Variable(_) | Place::Flag(_), Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    fn map<'de, V: Visitor<'de>>(
        self,
        fields: Option<&'static [&'static str]>,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Map(entries) => {
                let access = Map { reader: self, rest: entries.iter(), value: None, fields };
                visitor.visit_map(access).map_err(|fault| self.fault(fault))
            }
            _ => Err(self.wrong(&visitor)),
        }
    }
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(value) => match u64::try_from(*value) {
                Ok(value) => visitor.visit_u64(value),
                Err(_) => visitor.visit_i64(*value),
            },
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_str(value),
            Value::List(nodes) => {
                visitor.visit_seq(List { reader: self, rest: nodes.iter().enumerate() })
            }
            Value::Map(_) => return self.map(None, visitor),
        }
        .map_err(|fault| self.fault(fault))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.outside().map(str::parse) {
            Some(Ok(value)) => visitor.visit_bool(value),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.outside().map(str::parse) {
            Some(Ok(value)) => visitor.visit_u64(value).map_err(|fault: Fault| self.fault(fault)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.outside().is_some() {
            return Err(self.fault(Fault::custom("lists are set in the file only")));
        }
        match self.node.value {
            Value::List(_) => self.deserialize_any(visitor),
            _ => Err(self.wrong(&visitor)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.map(Some(fields), visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Text(text) => {
                let variant: StrDeserializer<'_, Fault> = text.as_str().into_deserializer();
                visitor.visit_enum(Variant(variant)).map_err(|fault| self.fault(fault))
            }
            _ => Err(self.wrong(&visitor)),
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct map identifier ignored_any
    }
}

/// A variant without data.
struct Variant<'a>(StrDeserializer<'a, Fault>);

impl<'de, 'a> EnumAccess<'de> for Variant<'a> {
    type Error = Fault;
    type Variant = Unit;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Unit), Fault> {
        Ok((seed.deserialize(self.0)?, Unit))
    }
}

struct Unit;

impl<'de> VariantAccess<'de> for Unit {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, _seed: S) -> Result<S::Value, Fault> {
        Err(Fault::custom("this value takes no data"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, Fault> {
        Err(Fault::custom("this value takes no data"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Fault> {
        Err(Fault::custom("this value takes no data"))
    }
}

struct List<'a> {
    reader: Reader<'a>,
    rest: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
}

impl<'de> SeqAccess<'de> for List<'_> {
    type Error = Fault;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Fault> {
        let next = self.rest.find(|(_, node)| node.value != Value::Null);
        let Some((index, node)) = next else { return Ok(None) };
        let path = self.reader.path.with(Step::Index(index));
        let reader = Reader { node, path: &path, unknown: self.reader.unknown };
        seed.deserialize(reader).map(Some).map_err(|fault| reader.fault(fault))
    }
}

struct Map<'a> {
    reader: Reader<'a>,
    rest: std::slice::Iter<'a, Entry>,
    value: Option<&'a Entry>,
    /// The keys a struct knows; a map takes any.
    fields: Option<&'static [&'static str]>,
}

impl Map<'_> {
    fn note_unknown(&self, entry: &Entry, fields: &[&str]) {
        let near = fields
            .iter()
            .map(|field| (strsim::damerau_levenshtein(field, &entry.key), field))
            .min()
            .filter(|(distance, field)| *distance <= 1 + field.len() / 3);
        let hint = match near {
            Some((_, field)) => format!("did you mean `{field}`?"),
            None => format!("known are {}", fields.join(", ")),
        };
        let key = self.reader.path.with(Step::Key(entry.key.clone()));
        self.reader.unknown.borrow_mut().push(Problem::new(
            entry.place.clone(),
            key.to_string(),
            format!("unknown key; {hint}"),
        ));
    }
}

impl<'de> MapAccess<'de> for Map<'_> {
    type Error = Fault;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Fault> {
        while let Some(entry) = self.rest.next() {
            if let Some(fields) = self.fields
                && !fields.contains(&entry.key.as_str())
            {
                self.note_unknown(entry, fields);
                continue;
            }
            self.value = Some(entry);
            let key: StrDeserializer<'_, Fault> = entry.key.as_str().into_deserializer();
            return seed.deserialize(key).map(Some);
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Fault> {
        let Some(entry) = self.value.take() else {
            return Err(Fault::custom("a value was asked for before its key"));
        };
        let path = self.reader.path.with(Step::Key(entry.key.clone()));
        let reader = Reader { node: &entry.node, path: &path, unknown: self.reader.unknown };
        seed.deserialize(reader).map_err(|fault| reader.fault(fault))
    }
}
