//! Payloads: the data of jobs, stored as JSON.
//!
//! A payload that arrives as JSON keeps its text, so that keys are not reordered and numbers are not
//! rounded. A payload that arrives as MessagePack is converted, so that only one format is stored.

use std::sync::Arc;

use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

/// A payload as JSON on one line. Clones share the text.
#[derive(Debug, Clone)]
pub(super) struct Payload(Arc<RawValue>);

impl Payload {
    /// Checks that the payload can be written in every format, and puts it on one line. Like the real server, refuses
    /// numbers beyond the range of `f64`, lone surrogates, and more than 127 levels of nesting.
    fn check(text: Box<RawValue>) -> Result<Self, serde_json::Error> {
        serde_json::from_str::<Value>(text.get())?;
        Ok(Self(on_one_line(text).into()))
    }

    pub(super) fn get(&self) -> &str {
        self.0.get()
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = if deserializer.is_human_readable() {
            Box::<RawValue>::deserialize(deserializer)?
        } else {
            to_raw_value(&Value::deserialize(deserializer)?).map_err(D::Error::custom)?
        };
        Self::check(text).map_err(|error| D::Error::custom(format_args!("payload: {error}")))
    }
}

impl Serialize for Payload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return self.0.serialize(serializer);
        }
        let value: Value = serde_json::from_str(self.get()).map_err(S::Error::custom)?;
        value.serialize(serializer)
    }
}

/// Replaces line breaks with spaces, because a job is one line in NDJSON and in server-sent events. The payload keeps its
/// meaning: line breaks in JSON strings are escaped, so all replaced line breaks are white space between tokens.
fn on_one_line(payload: Box<RawValue>) -> Box<RawValue> {
    if !payload.get().contains(['\n', '\r']) {
        return payload;
    }
    let line = payload.get().replace(['\n', '\r'], " ");
    RawValue::from_string(line).unwrap_or(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_on_many_lines_becomes_one_line() {
        let payload: Payload = serde_json::from_str("{\r\n\"a\":\n\"x\\ny\"}").unwrap();
        assert_eq!(payload.get(), r#"{  "a": "x\ny"}"#);
    }

    #[test]
    fn a_payload_means_the_same_in_both_formats() {
        let json = r#"{"big":18446744073709551615,"list":[null,true,-1,1.5],"text":"é"}"#;
        let payload: Payload = serde_json::from_str(json).unwrap();
        let packed = rmp_serde::to_vec_named(&payload).unwrap();
        assert_eq!(rmp_serde::from_slice::<Value>(&packed).unwrap()["big"], u64::MAX);
        assert_eq!(rmp_serde::from_slice::<Payload>(&packed).unwrap().get(), json);
    }

    #[test]
    fn a_payload_that_only_one_format_can_hold_is_refused() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for json in ["1e400", r#""\ud800""#, deep.as_str()] {
            assert!(serde_json::from_str::<Payload>(json).is_err(), "{json}");
        }
        let bytes = [0xc4, 1, 0];
        assert!(rmp_serde::from_slice::<Payload>(&bytes).is_err());
    }
}
