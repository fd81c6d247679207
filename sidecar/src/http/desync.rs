//! HTTP desync mitigation: classifies deviations of a request from strict HTTP/1.1 and decides what is done with it.
//!
//! The reasons and tiers have the names of AWS' desync mitigation mode. One difference: weft forwards every request in
//! strict form. A request that has no unambiguous strict form is therefore refused in every mode. A request whose only
//! unambiguous form follows from a rule of the standard that some services ignore is served in `monitor` mode only.

use weft_model::DesyncMode;

/// How severe a deviation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DesyncTier {
    /// Violates the standard, without a known risk.
    Acceptable,
    /// Services may interpret it in different ways.
    Ambiguous,
    /// Probably an attempt at request smuggling.
    Severe,
}

/// Whether a request has a strict form that all services interpret in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StrictForm {
    /// It has one.
    Unambiguous,
    /// The standard defines one, but some services do not follow it.
    ByStandardOnly,
    /// It has none.
    None,
}

/// What is done with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DesyncAction {
    /// Serve the request.
    Allow,
    /// Serve the request over an upstream connection of its own: some services do not read such a body, and would
    /// interpret it as the next request.
    Isolate,
    /// Serve the request, then close its client and upstream connections.
    AllowAndClose,
    /// Refuse the request and close its connection.
    Refuse,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident: $tier:ident, $form:ident, $detail:literal;)*) => {
        /// A kind of deviation, named as in the access logs of AWS load balancers (`classification_reason`).
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum DesyncReason {
            $(#[doc = $detail] $name,)*
        }

        impl DesyncReason {
            /// All reasons.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name in logs and metrics.
            pub(crate) fn word(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// A description for error messages.
            pub(crate) fn detail(self) -> &'static str {
                match self { $(Self::$name => $detail,)* }
            }

            pub(crate) fn tier(self) -> DesyncTier {
                match self { $(Self::$name => DesyncTier::$tier,)* }
            }

            fn strict_form(self) -> StrictForm {
                match self { $(Self::$name => StrictForm::$form,)* }
            }
        }
    };
}

reasons! {
    GetHeadZeroContentLength: Acceptable, Unambiguous, "GET or HEAD with content-length 0";
    NonCompliantHeader: Acceptable, Unambiguous, "header value with non-ASCII bytes";
    NonCompliantVersion: Acceptable, Unambiguous, "HTTP/1 version above 1.1";
    NonCrLfLineTermination: Acceptable, ByStandardOnly, "line ends without a carriage return";
    SpaceInUri: Acceptable, None, "space in the request target";
    AmbiguousUri: Ambiguous, None, "character in the request target that no URI may contain";
    BothTeClPresent: Ambiguous, ByStandardOnly, "both content-length and transfer-encoding";
    DuplicateContentLength: Ambiguous, ByStandardOnly, "more than one content-length header";
    EmptyHeader: Ambiguous, None, "header without a name";
    SuspiciousHeader: Ambiguous, Unambiguous, "header name resembles content-length or transfer-encoding";
    UndefinedContentLengthSemantics: Ambiguous, Unambiguous, "GET or HEAD with a content-length";
    UndefinedTransferEncodingSemantics: Ambiguous, Unambiguous, "GET or HEAD with a transfer-encoding";
    MultilineHeader: Ambiguous, None, "folded header: its value continues on the next line";
    PartialHeaderLine: Ambiguous, None, "incomplete header line";
    MissingLastEmptyLine: Ambiguous, None, "no empty line after the headers";
    MissingHeaderColon: Ambiguous, None, "header without a colon";
    MissingUri: Ambiguous, None, "missing request target";
    BadContentLength: Severe, None, "invalid content-length: must be a number";
    BadHeader: Severe, None, "invalid character in a header";
    BadMethod: Severe, None, "invalid method: must be a token";
    BadTransferEncoding: Severe, None, "invalid transfer-encoding: must be chunked";
    BadUri: Severe, None, "invalid request target: must be a path or an http URI";
    BadVersion: Severe, None, "invalid HTTP version";
    MultipleContentLength: Severe, None, "several content-length headers with different values";
    MultipleTransferEncodingChunked: Severe, None, "chunked more than once in transfer-encoding";
    SuspiciousTeClPresent: Severe, None, "framing header beside a header name that resembles one";
}

impl DesyncReason {
    /// The position in [`Self::ALL`].
    pub(crate) fn index(self) -> usize {
        self as usize
    }

    /// What `mode` does with a request that has this deviation.
    pub(crate) fn action(self, mode: DesyncMode) -> DesyncAction {
        let has_unusual_body = matches!(
            self,
            Self::UndefinedContentLengthSemantics | Self::UndefinedTransferEncodingSemantics
        );
        match (self.strict_form(), mode, self.tier()) {
            (StrictForm::Unambiguous, DesyncMode::Defensive, DesyncTier::Ambiguous) if has_unusual_body => {
                DesyncAction::Isolate
            }
            (StrictForm::None, _, _)
            | (_, DesyncMode::Strictest, _)
            | (StrictForm::ByStandardOnly, DesyncMode::Defensive, _)
            | (StrictForm::Unambiguous, DesyncMode::Defensive, DesyncTier::Severe) => DesyncAction::Refuse,
            (StrictForm::Unambiguous, DesyncMode::Defensive, DesyncTier::Acceptable)
            | (StrictForm::Unambiguous, DesyncMode::Monitor, _) => DesyncAction::Allow,
            (StrictForm::Unambiguous, DesyncMode::Defensive, DesyncTier::Ambiguous)
            // RFC 9112, section 6.1, requires closing the connection after such a message.
            | (StrictForm::ByStandardOnly, DesyncMode::Monitor, _) => DesyncAction::AllowAndClose,
        }
    }
}

/// The worst deviation found in one request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DesyncFindings(Option<DesyncReason>);

impl DesyncFindings {
    /// Adds a deviation.
    pub(crate) fn add(&mut self, reason: DesyncReason) {
        let is_worse = self.0.is_none_or(|worst| {
            (reason.strict_form() as u8, reason.tier()) > (worst.strict_form() as u8, worst.tier())
        });
        if is_worse {
            self.0 = Some(reason);
        }
    }

    /// The worst deviation; none when the request is strict.
    pub(crate) fn worst(self) -> Option<DesyncReason> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn action_for_each_reason_and_mode_matches_the_table() {
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
    fn worst_of_several_deviations_decides() {
        let worst = |reasons: &[DesyncReason]| {
            let mut findings = DesyncFindings::default();
            reasons.iter().for_each(|reason| findings.add(*reason));
            findings.worst()
        };
        assert_eq!(worst(&[]), None);
        let mild = DesyncReason::NonCompliantHeader;
        let severe = DesyncReason::BothTeClPresent;
        for order in [[mild, severe], [severe, mild]] {
            assert_eq!(worst(&order), Some(severe));
        }
        let order = [DesyncReason::SuspiciousHeader, DesyncReason::GetHeadZeroContentLength];
        assert_eq!(worst(&order), Some(DesyncReason::SuspiciousHeader));
    }
}
