//! How a request departs from strict HTTP/1.1, and what is done about it.
//!
//! The reasons and their tiers are those of AWS' desync mitigation, so that who comes from there finds
//! the same words. What differs: whatever is forwarded is forwarded in strict form, so a request
//! without a single reading is refused in every mode, and one that only the standard's own rule gives
//! a reading (while services are known to disagree) goes through in `monitor` alone.

use weft_model::DesyncMode;

/// How far a request departs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DesyncTier {
    /// Not what the standard says, and no risk is known.
    Acceptable,
    /// Services may read it in several ways.
    Ambiguous,
    /// It looks like an attempt to be read in two ways.
    Severe,
}

/// Whether all who read a request's strict form read the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// They do.
    One,
    /// The standard has a rule for it that not everybody keeps.
    OneByRule,
    /// There is no strict form.
    None,
}

/// What is done with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DesyncAction {
    /// It is served.
    Allow,
    /// It is served over a connection to the service that is used for nothing else: some services do not
    /// read such a body, and would take it for the next request.
    Isolate,
    /// It is served, and no other request follows on its connections.
    AllowAndClose,
    /// It is refused, and its connection is closed.
    Refuse,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident: $tier:ident, $reading:ident, $detail:literal;)*) => {
        /// One way to depart from the standard. Named as AWS names it in access logs
        /// (`classification_reason`).
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum DesyncReason {
            $(#[doc = $detail] $name,)*
        }

        impl DesyncReason {
            /// All there are.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its word in logs and metrics.
            pub(crate) fn word(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What it is, for people.
            pub(crate) fn detail(self) -> &'static str {
                match self { $(Self::$name => $detail,)* }
            }

            pub(crate) fn tier(self) -> DesyncTier {
                match self { $(Self::$name => DesyncTier::$tier,)* }
            }

            fn reading(self) -> Reading {
                match self { $(Self::$name => Reading::$reading,)* }
            }
        }
    };
}

reasons! {
    GetHeadZeroContentLength: Acceptable, One, "a GET or HEAD with a content-length of 0";
    NonCompliantHeader: Acceptable, One, "a field value with bytes that are no ASCII";
    NonCompliantVersion: Acceptable, One, "a version of HTTP/1 above 1.1";
    NonCrLfLineTermination: Acceptable, OneByRule, "a line ends without a carriage return";
    SpaceInUri: Acceptable, None, "the target has a space";
    AmbiguousUri: Ambiguous, None, "the target has a character that no URI may have";
    BothTeClPresent: Ambiguous, OneByRule, "both content-length and transfer-encoding";
    DuplicateContentLength: Ambiguous, OneByRule, "more than one content-length";
    EmptyHeader: Ambiguous, None, "a field has no name";
    SuspiciousHeader: Ambiguous, One, "a field's name looks like one that frames the message";
    UndefinedContentLengthSemantics: Ambiguous, One, "a GET or HEAD with a content-length";
    UndefinedTransferEncodingSemantics: Ambiguous, One, "a GET or HEAD with a transfer-encoding";
    MultilineHeader: Ambiguous, None, "a field goes on on the next line";
    PartialHeaderLine: Ambiguous, None, "a field's line is not whole";
    MissingLastEmptyLine: Ambiguous, None, "the head does not end with an empty line";
    MissingHeaderColon: Ambiguous, None, "a field has no colon";
    MissingUri: Ambiguous, None, "there is no target";
    BadContentLength: Severe, None, "the content-length is no number";
    BadHeader: Severe, None, "a field has a character that no field may have";
    BadMethod: Severe, None, "the method is no token";
    BadTransferEncoding: Severe, None, "a transfer-encoding other than chunked, once";
    BadUri: Severe, None, "the target is neither a path nor a URI";
    BadVersion: Severe, None, "the version is no HTTP version";
    MultipleContentLength: Severe, None, "more than one content-length, and they differ";
    MultipleTransferEncodingChunked: Severe, None, "chunked stands in transfer-encoding more than once";
    SuspiciousTeClPresent: Severe, None, "beside the field that frames the message is one that looks like it";
}

impl DesyncReason {
    /// Its place among all.
    pub(crate) fn index(self) -> usize {
        self as usize
    }

    /// What a mode does with a request that departs so.
    pub(crate) fn action(self, mode: DesyncMode) -> DesyncAction {
        let has_odd_body = matches!(
            self,
            Self::UndefinedContentLengthSemantics | Self::UndefinedTransferEncodingSemantics
        );
        match (self.reading(), mode, self.tier()) {
            (Reading::One, DesyncMode::Defensive, DesyncTier::Ambiguous) if has_odd_body => {
                DesyncAction::Isolate
            }
            (Reading::None, _, _)
            | (_, DesyncMode::Strictest, _)
            | (Reading::OneByRule, DesyncMode::Defensive, _)
            | (Reading::One, DesyncMode::Defensive, DesyncTier::Severe) => DesyncAction::Refuse,
            (Reading::One, DesyncMode::Defensive, DesyncTier::Acceptable)
            | (Reading::One, DesyncMode::Monitor, _) => DesyncAction::Allow,
            (Reading::One, DesyncMode::Defensive, DesyncTier::Ambiguous)
            // After such a message the connection must be closed (RFC 9112, section 6.1).
            | (Reading::OneByRule, DesyncMode::Monitor, _) => DesyncAction::AllowAndClose,
        }
    }
}

/// The worst of what was found in one request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DesyncFindings(Option<DesyncReason>);

impl DesyncFindings {
    /// Takes down one more.
    pub(crate) fn add(&mut self, reason: DesyncReason) {
        let worse = self.0.is_none_or(|held| {
            (reason.reading() as u8, reason.tier()) > (held.reading() as u8, held.tier())
        });
        if worse {
            self.0 = Some(reason);
        }
    }

    /// The worst; none when the request is strict.
    pub(crate) fn worst(self) -> Option<DesyncReason> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_does_with_each_reason_what_the_table_says() {
        use DesyncAction::{Allow, AllowAndClose, Isolate, Refuse};
        let check = |reason: DesyncReason, expected: [DesyncAction; 3]| {
            let modes = [DesyncMode::Monitor, DesyncMode::Defensive, DesyncMode::Strictest];
            assert_eq!(modes.map(|mode| reason.action(mode)), expected, "{reason:?}");
        };
        for reason in DesyncReason::ALL {
            let expected = match reason {
                DesyncReason::GetHeadZeroContentLength
                | DesyncReason::NonCompliantHeader
                | DesyncReason::NonCompliantVersion => [Allow, Allow, Refuse],
                DesyncReason::SuspiciousHeader => [Allow, AllowAndClose, Refuse],
                DesyncReason::UndefinedContentLengthSemantics
                | DesyncReason::UndefinedTransferEncodingSemantics => [Allow, Isolate, Refuse],
                DesyncReason::NonCrLfLineTermination
                | DesyncReason::BothTeClPresent
                | DesyncReason::DuplicateContentLength => [AllowAndClose, Refuse, Refuse],
                _ => [Refuse, Refuse, Refuse],
            };
            check(*reason, expected);
        }
        assert_eq!(DesyncReason::ALL.len(), 26);
    }

    #[test]
    fn the_worst_of_several_counts() {
        let worst = |reasons: &[DesyncReason]| {
            let mut found = DesyncFindings::default();
            reasons.iter().for_each(|reason| found.add(*reason));
            found.worst()
        };
        assert_eq!(worst(&[]), None);
        let (mild, rule) = (DesyncReason::NonCompliantHeader, DesyncReason::BothTeClPresent);
        for order in [[mild, rule], [rule, mild]] {
            assert_eq!(worst(&order), Some(rule));
        }
        let order = [DesyncReason::SuspiciousHeader, DesyncReason::GetHeadZeroContentLength];
        assert_eq!(worst(&order), Some(DesyncReason::SuspiciousHeader));
    }
}
