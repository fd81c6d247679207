//! Reads a message field by field, and reports fields that were not read.
//!
//! Reading a field *takes* it out of the message. The fields left when a reader is dropped are not supported: each is
//! listed as not honoured or, when ignoring it would weaken security, the whole resource is rejected. Unsupported fields
//! are therefore never ignored silently, and a new xDS field is reported without a change to this code.

use std::cell::RefCell;
use std::fmt;
use std::time::Duration;

use prost_reflect::bytes::Bytes;
use prost_reflect::prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, MapKey, ReflectMessage, Value};

use super::Notes;
use super::security_fields::{SECURITY_FIELDS, is_security};
use crate::descriptor;

/// The reason of a missing required field.
pub(super) const MISSING: &str = "this field is missing";

/// Why a resource is rejected: the field, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The field path, such as `filter_chains[0].filters[1].typed_config`.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            write!(f, "{}", self.reason)
        } else {
            write!(f, "{}: {}", self.path, self.reason)
        }
    }
}

/// The findings about one resource.
#[derive(Debug, Default)]
pub(crate) struct TranslationFindings {
    /// Fields that were set and not read, and settings that weaken security.
    pub(crate) notes: Notes,
    /// The first unread field that is relevant for security.
    pub(crate) refused: Option<FieldError>,
}

/// What happens with a field that is set and not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unread {
    /// It is listed as not honoured, unless its type or name is relevant for security.
    Report,
    /// The resource is rejected: the message, or one around it, is relevant for security.
    RejectResource,
    /// It is always listed: the message is not enforced.
    ReportAlways,
}

/// Reads the fields of one message; see the module documentation.
pub(crate) struct MessageReader<'f> {
    message: DynamicMessage,
    path: String,
    findings: &'f RefCell<TranslationFindings>,
    unread: Unread,
}

impl<'f> MessageReader<'f> {
    /// Starts to read a message at `path` of the resource.
    pub(crate) fn new(
        message: DynamicMessage,
        path: String,
        findings: &'f RefCell<TranslationFindings>,
    ) -> Self {
        Self::within(Unread::Report, message, path, findings)
    }

    fn within(
        around: Unread,
        message: DynamicMessage,
        path: String,
        findings: &'f RefCell<TranslationFindings>,
    ) -> Self {
        let unread = match around {
            Unread::Report if is_security(message.descriptor().full_name()) => {
                Unread::RejectResource
            }
            around => around,
        };
        Self { message, path, findings, unread }
    }

    /// For dry-run rules (`shadow_rules`): unsupported fields are listed, because these rules are not enforced.
    pub(crate) fn shadow_rules(mut self) -> Self {
        self.unread = Unread::ReportAlways;
        self
    }

    /// Lists fields as not honoured without rejecting the resource: they do not change which requests are allowed.
    pub(crate) fn unenforced(&mut self, fields: &[&str]) {
        for field in fields {
            if self.take(field).is_some() {
                self.findings.borrow_mut().notes.not_honoured.push(join(&self.path, field));
            }
        }
    }

    /// An error about a field of this message.
    pub(crate) fn refuse(&self, field: &str, reason: impl Into<String>) -> FieldError {
        FieldError { path: join(&self.path, field), reason: reason.into() }
    }

    /// Adds a warning about a setting that weakens security.
    pub(crate) fn warn(&self, field: &str, text: &str) {
        let warning = format!("{}: {text}", join(&self.path, field));
        self.findings.borrow_mut().notes.warnings.push(warning);
    }

    /// Lists a part of this message as not honoured.
    pub(crate) fn not_honoured(&self, field: &str, text: &str) {
        let path = format!("{} ({text})", join(&self.path, field));
        self.findings.borrow_mut().notes.not_honoured.push(path);
    }

    /// Whether the field is set and not yet taken.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.message.has_field_by_name(field)
    }

    /// A text at a path below this message, without taking it. Lists on the path: their first item.
    pub(crate) fn peek(&self, path: &[&str]) -> Option<String> {
        let (last, above) = path.split_last()?;
        let mut message = self.message.clone();
        for field in above {
            message = match message.get_field_by_name(field)?.as_ref() {
                Value::Message(below) => below.clone(),
                Value::List(list) => list.first()?.as_message()?.clone(),
                _ => return None,
            };
        }
        message.get_field_by_name(last)?.as_str().map(str::to_owned)
    }

    /// Whether all fields are taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.message.fields().next().is_none() && self.message.unknown_fields().next().is_none()
    }

    /// The full name of the message's type.
    pub(crate) fn kind(&self) -> String {
        self.message.descriptor().full_name().to_owned()
    }

    /// Drops fields that have no meaning here and are harmless, such as names for statistics.
    pub(crate) fn harmless(&mut self, fields: &[&str]) {
        for field in fields {
            self.message.clear_field_by_name(field);
        }
    }

    fn take(&mut self, field: &str) -> Option<Value> {
        debug_assert!(
            self.message.descriptor().get_field_by_name(field).is_some(),
            "{} has no field {field}",
            self.message.descriptor().full_name()
        );
        self.message.take_field_by_name(field)
    }

    /// A string; empty when it is not set.
    pub(crate) fn text(&mut self, field: &str) -> String {
        match self.take(field) {
            Some(Value::String(text)) => text,
            _ => String::new(),
        }
    }

    /// A string that must not be empty.
    pub(crate) fn required_text(&mut self, field: &str) -> Result<String, FieldError> {
        let text = self.text(field);
        if text.is_empty() { Err(self.refuse(field, MISSING)) } else { Ok(text) }
    }

    /// A list of strings.
    pub(crate) fn texts(&mut self, field: &str) -> Vec<String> {
        match self.take(field) {
            Some(Value::List(list)) => {
                list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// A boolean, plain or wrapped.
    pub(crate) fn flag(&mut self, field: &str) -> Option<bool> {
        match self.take(field)? {
            Value::Bool(flag) => Some(flag),
            wrapped => unwrapped(wrapped, |v| v.as_bool()),
        }
    }

    /// A whole number, plain or wrapped, that fits `u32`.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a JSON number has no other type here, and its range is checked first"
    )]
    pub(crate) fn number(&mut self, field: &str) -> Option<u32> {
        let narrow = |v: &Value| match v {
            Value::U32(n) => Some(*n),
            Value::U64(n) => u32::try_from(*n).ok(),
            Value::I32(n) => u32::try_from(*n).ok(),
            Value::I64(n) => u32::try_from(*n).ok(),
            Value::F64(n) => {
                let fits = n.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(n);
                fits.then_some(*n as u32)
            }
            _ => None,
        };
        let value = self.take(field)?;
        narrow(&value).or_else(|| unwrapped(value, narrow))
    }

    /// A decimal number; 0 when it is not set.
    pub(crate) fn decimal(&mut self, field: &str) -> Option<f64> {
        match self.take(field) {
            None => Some(0.0),
            Some(value) => value.as_f64(),
        }
    }

    /// A whole number that may be negative; 0 when it is not set.
    pub(crate) fn integer(&mut self, field: &str) -> i64 {
        match self.take(field) {
            Some(Value::I64(number)) => number,
            Some(Value::I32(number)) => number.into(),
            _ => 0,
        }
    }

    /// A duration that is not negative.
    pub(crate) fn duration(&mut self, field: &str) -> Result<Option<Duration>, FieldError> {
        let Some(Value::Message(message)) = self.take(field) else {
            return Ok(None);
        };
        let part = |name: &str| {
            message
                .get_field_by_name(name)
                .and_then(|v| v.as_i64().or_else(|| v.as_i32().map(i64::from)))
                .unwrap_or(0)
        };
        let seconds = u64::try_from(part("seconds"));
        let nanos = u32::try_from(part("nanos"));
        match (seconds, nanos) {
            (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
                Ok(Some(Duration::new(seconds, nanos)))
            }
            _ => Err(self.refuse(
                field,
                "invalid duration: must be 0 or more, with less than 10^9 nanoseconds",
            )),
        }
    }

    /// The name of an enumeration value, its number when it has none; the default when not set.
    pub(crate) fn choice(&mut self, field: &str) -> String {
        let Some(descriptor) = self.message.descriptor().get_field_by_name(field) else {
            return String::new();
        };
        let number = match self.take(field) {
            Some(Value::EnumNumber(number)) => number,
            _ => 0,
        };
        match descriptor.kind().as_enum().and_then(|e| e.get_value(number)) {
            Some(value) => value.name().to_owned(),
            None => number.to_string(),
        }
    }

    /// A message.
    pub(crate) fn child(&mut self, field: &str) -> Option<Self> {
        match self.take(field)? {
            Value::Message(message) => Some(self.nested(message, field)),
            _ => None,
        }
    }

    /// A required message.
    pub(crate) fn required_child(&mut self, field: &str) -> Result<Self, FieldError> {
        self.child(field).ok_or_else(|| self.refuse(field, MISSING))
    }

    /// The messages of a list that may be very long.
    ///
    /// A `DynamicMessage` takes many times the memory of its encoded bytes. The list is therefore encoded again, and
    /// its messages are decoded one after the other. Otherwise the decoded values would be scattered between the freed
    /// messages, and the heap could not be returned to the system.
    pub(crate) fn messages(
        &mut self,
        field: &str,
    ) -> impl Iterator<Item = Result<DynamicMessage, FieldError>> + use<> {
        let kind = self.message.descriptor().get_field_by_name(field).map(|field| field.kind());
        let mut bytes = Vec::new();
        if let Some(Value::List(list)) = self.take(field) {
            for message in list.iter().filter_map(Value::as_message) {
                bytes.extend(message.encode_length_delimited_to_vec());
            }
        }
        let mut bytes = Bytes::from(bytes);
        let path = join(&self.path, field);
        std::iter::from_fn(move || {
            let kind = kind.as_ref()?.as_message().filter(|_| !bytes.is_empty())?;
            let mut message = DynamicMessage::new(kind.clone());
            let outcome = message.merge_length_delimited(&mut bytes);
            Some(outcome.map(|()| message).map_err(|error| {
                bytes.clear();
                FieldError { path: path.clone(), reason: error.to_string() }
            }))
        })
    }

    /// Calls `read` for each message of a list that may be very long; returns the values or the first error.
    pub(crate) fn many<T>(
        &mut self,
        field: &str,
        mut read: impl FnMut(Self) -> Result<T, FieldError>,
    ) -> Result<Vec<T>, FieldError> {
        let mut items = Vec::new();
        for (index, message) in self.messages(field).enumerate() {
            items.push(read(self.nested(message?, &format!("{field}[{index}]")))?);
        }
        items.shrink_to_fit();
        Ok(items)
    }

    /// A list of messages.
    pub(crate) fn children(&mut self, field: &str) -> Vec<Self> {
        let Some(Value::List(list)) = self.take(field) else {
            return Vec::new();
        };
        let message =
            |value| if let Value::Message(message) = value { Some(message) } else { None };
        let messages = list.into_iter().filter_map(message).enumerate();
        messages
            .map(|(index, message)| self.nested(message, &format!("{field}[{index}]")))
            .collect()
    }

    /// A map from names to messages, sorted by name.
    pub(crate) fn map(&mut self, field: &str) -> Vec<(String, Self)> {
        let Some(Value::Map(map)) = self.take(field) else {
            return Vec::new();
        };
        let mut entries: Vec<_> = map
            .into_iter()
            .filter_map(|(key, value)| match (key, value) {
                (MapKey::String(key), Value::Message(message)) => {
                    let reader = self.nested(message, &format!("{field}[{key:?}]"));
                    Some((key, reader))
                }
                _ => None,
            })
            .collect();
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        entries
    }

    /// The message inside an `Any` field.
    ///
    /// # Errors
    /// When the type is unknown, or the bytes are not a valid message of it.
    pub(crate) fn any(&mut self, field: &str) -> Result<Option<Self>, FieldError> {
        let Some(any) = self.child(field) else {
            return Ok(None);
        };
        any.unpacked().map(Some)
    }

    /// The full name of the type inside this `Any`, known or not.
    pub(crate) fn any_kind(&self) -> String {
        let url = self.message.get_field_by_name("type_url");
        let url = url.and_then(|url| url.as_str().map(str::to_owned)).unwrap_or_default();
        url.rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// The fields that are not taken yet, encoded, to be passed on unread.
    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        let bytes = self.message.encode_to_vec();
        self.message = DynamicMessage::new(self.message.descriptor());
        bytes
    }

    /// Ignores the rest of this message, after the caller has listed it as not honoured.
    pub(crate) fn set_aside(mut self) {
        self.message = DynamicMessage::new(self.message.descriptor());
    }

    /// The message inside this `Any`.
    pub(crate) fn unpacked(mut self) -> Result<Self, FieldError> {
        let type_url = self.text("type_url");
        let bytes = self.bytes("value");
        let message =
            descriptor::decode(&type_url, &bytes).map_err(|reason| self.refuse("", reason))?;
        Ok(Self::within(self.unread, message, self.path.clone(), self.findings))
    }

    /// Bytes; empty when not set.
    pub(crate) fn bytes(&mut self, field: &str) -> Vec<u8> {
        match self.take(field) {
            Some(Value::Bytes(bytes)) => bytes.to_vec(),
            _ => Vec::new(),
        }
    }

    fn nested(&self, message: DynamicMessage, field: &str) -> Self {
        Self::within(self.unread, message, join(&self.path, field), self.findings)
    }

    /// Whether an unread field rejects the resource.
    fn is_refused(&self, field: &FieldDescriptor) -> bool {
        let kind = self.message.descriptor().name().to_owned();
        match self.unread {
            Unread::ReportAlways => false,
            Unread::RejectResource => true,
            Unread::Report => {
                let kind_of_field = field.kind();
                let message = kind_of_field.as_message();
                message.is_some_and(|message| is_security(message.full_name()))
                    || SECURITY_FIELDS.contains(&format!("{kind}.{}", field.name()).as_str())
            }
        }
    }
}

impl Drop for MessageReader<'_> {
    /// Records the unread fields.
    fn drop(&mut self) {
        let mut findings = self.findings.borrow_mut();
        let mut note = |name: &str, is_refused: bool| {
            let path = join(&self.path, name);
            if is_refused {
                findings.refused.get_or_insert_with(|| FieldError {
                    path: path.clone(),
                    reason: "not implemented, and ignoring it would weaken security".into(),
                });
            }
            findings.notes.not_honoured.push(path);
        };
        for (field, _) in self.message.fields() {
            note(field.name(), self.is_refused(&field));
        }
        for unknown in self.message.unknown_fields() {
            let name = format!("unknown field {}", unknown.number());
            note(&name, self.unread == Unread::RejectResource);
        }
    }
}

fn join(path: &str, field: &str) -> String {
    match (path.is_empty(), field.is_empty()) {
        (_, true) => path.to_owned(),
        (true, false) => field.to_owned(),
        (false, false) => format!("{path}.{field}"),
    }
}

fn unwrapped<T>(value: Value, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
    let Value::Message(message) = value else {
        return None;
    };
    message.get_field_by_name("value").and_then(|value| read(&value))
}
