//! Verifies the tokens that a policy requires of a request.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderName, HeaderValue};
use serde_json::{Map, Value};
use weft_certs::{KeySet, SignatureVerdict, VerifiedPeer};
use weft_model::{JwtPolicy, JwtProvider, JwtRequirement, Name, RequestFacts};

use super::cache::{TokenCache, VerifiedToken};
use super::claims;
use super::fault::{TokenFault, TokenRejection};
use super::key_store::RefetchFlag;
use super::token::Token;
use super::token_location::{self, OriginalHead, TokenLookup};
use super::verified::{ProviderToken, VerifiedTokens};
use crate::http::head::RequestHead;
use crate::http::header_filter::is_same_header_name;
use crate::request_facts::HttpRequestFacts;

/// A token policy with the keys of its providers.
#[derive(Debug)]
pub(crate) struct TokenPolicy {
    policy: Arc<JwtPolicy>,
    providers: BTreeMap<Name, PlannedProvider>,
    /// The headers that hold claims for services, in lower case. A client must not set them.
    headers: Vec<String>,
}

/// A token provider with its keys.
#[derive(Debug)]
pub(crate) struct PlannedProvider {
    /// Changes with the settings and keys of the provider.
    pub(crate) number: u64,
    pub(crate) provider: JwtProvider,
    /// The keys, or why there are none.
    pub(crate) keys: Result<Arc<KeySet>, TokenFault>,
    /// The flag that requests a fetch for an unknown key; none where keys are not fetched.
    pub(crate) refetch: Option<RefetchFlag>,
}

/// The token rules that match the readings of a path. Does not allocate for one rule.
#[derive(Debug, Default)]
pub(crate) struct RuleIndexes {
    first: Option<usize>,
    others: Vec<usize>,
}

impl RuleIndexes {
    /// Adds the rule that matches one more reading; none: no token is required.
    pub(crate) fn add(&mut self, rule: Option<usize>) {
        let Some(rule) = rule else { return };
        match self.first {
            None => self.first = Some(rule),
            Some(first) if first == rule || self.others.contains(&rule) => {}
            Some(_) => self.others.push(rule),
        }
    }

    fn iter(&self) -> impl Iterator<Item = usize> {
        self.first.into_iter().chain(self.others.iter().copied())
    }
}

/// What tokens are checked with.
pub(crate) struct TokenContext<'a> {
    pub(crate) peer: Option<&'a VerifiedPeer>,
    pub(crate) now: SystemTime,
    pub(crate) cache: &'a TokenCache,
}

/// The issuer has no key with the token's key ID.
const NO_KEY: TokenRejection = TokenRejection::new(TokenFault::Signature, "unknown signing key");

const OTHER_AUDIENCE: TokenRejection =
    TokenRejection::new(TokenFault::ClaimValue, "the token is for another audience");

/// A provider's token that was accepted.
struct AcceptedToken<'t> {
    planned: &'t PlannedProvider,
    checked: Rc<VerifiedToken>,
}

impl TokenPolicy {
    pub(crate) fn new(policy: Arc<JwtPolicy>, providers: BTreeMap<Name, PlannedProvider>) -> Self {
        let all = providers.values().map(|planned| &planned.provider);
        let headers = all.flat_map(|provider| {
            let claims = provider.claim_headers.iter().map(|(_, field)| field.clone());
            claims.chain(provider.payload_header.clone())
        });
        let headers = headers.collect();
        Self { policy, providers, headers }
    }

    /// Whether a header holds claims. `_` counts as `-`, because some services treat them as the same.
    pub(crate) fn writes_header(&self, name: &[u8]) -> bool {
        self.headers.iter().any(|header| is_same_header_name(name, header.as_bytes()))
    }

    /// The headers that hold claims for services.
    pub(crate) fn written_headers(&self) -> impl Iterator<Item = &str> {
        self.headers.iter().map(String::as_str)
    }

    /// Verifies the tokens of a request for each rule that matches a reading of its path, and writes their claims to
    /// headers for the service.
    ///
    /// # Errors
    /// When a required token is missing or rejected.
    pub(crate) fn check(
        &self,
        head: &mut RequestHead,
        rules: impl FnOnce(&RequestHead) -> RuleIndexes,
        context: &TokenContext<'_>,
    ) -> Result<VerifiedTokens, TokenRejection> {
        head.headers.remove(|name| self.writes_header(name));
        let rules = rules(head);
        let rules = rules.iter().filter_map(|index| self.policy.rules.get(index));
        let mut good: Vec<AcceptedToken<'_>> = Vec::new();
        for requirement in rules.filter_map(|rule| rule.requires.as_ref()) {
            self.verify_required(requirement, head, context, &mut good)?;
        }
        let mut tokens = VerifiedTokens::default();
        for (index, AcceptedToken { planned, checked }) in good.iter().enumerate() {
            let before = good.iter().take(index);
            // Several rules may require the same token.
            if before.clone().any(|good| good.planned.number == planned.number) {
                continue;
            }
            tokens.add(planned, checked);
            write_claims(head, &planned.provider, checked);
        }
        Ok(tokens)
    }

    /// The index of the rule that matches a request.
    pub(crate) fn rule(&self, facts: &dyn RequestFacts) -> Option<usize> {
        self.policy.rule(facts)
    }

    /// Removes the verified tokens of providers that do not forward them, as Envoy does, and returns the original of what that
    /// changed. Tokens that no rule verified stay: they may be credentials for the service itself, such as `Basic`.
    pub(crate) fn remove_verified(
        &self,
        head: &mut RequestHead,
        tokens: &VerifiedTokens,
    ) -> OriginalHead {
        let mut before = OriginalHead::default();
        let is_verified = |number| tokens.tokens.iter().any(|token| token.provider == number);
        let concealed =
            |planned: &&PlannedProvider| !planned.provider.forward && is_verified(planned.number);
        for planned in self.providers.values().filter(concealed) {
            token_location::remove_tokens(head, &planned.provider.token_locations, &mut before);
        }
        before
    }

    /// Whether two policies differ.
    pub(crate) fn differ(&self, other: &Self) -> bool {
        self.policy != other.policy
    }

    /// Checks whether the verified tokens of a request in flight satisfy this policy. The expiry of the tokens is handled
    /// separately.
    ///
    /// # Errors
    /// When a required token is missing or no longer accepted.
    pub(crate) fn recheck(
        &self,
        tokens: &VerifiedTokens,
        facts: HttpRequestFacts<'_>,
        peer: Option<&VerifiedPeer>,
    ) -> Result<(), TokenRejection> {
        facts.readings().try_for_each(|facts| {
            let rule = self.rule(&facts).and_then(|index| self.policy.rules.get(index));
            let requirement = rule.and_then(|rule| rule.requires.as_ref());
            requirement.map_or(Ok(()), |requirement| self.satisfy(tokens, requirement, peer))
        })
    }

    fn satisfy(
        &self,
        tokens: &VerifiedTokens,
        requirement: &JwtRequirement,
        peer: Option<&VerifiedPeer>,
    ) -> Result<(), TokenRejection> {
        match requirement {
            JwtRequirement::Provider(name, audiences) => {
                let missing = TokenRejection::MISSING;
                let planned = self.providers.get(name).ok_or(missing)?;
                let fits = |checked: &VerifiedToken| {
                    planned.check_issuer(&checked.claims)?;
                    claims::check(&checked.claims, &planned.provider)?;
                    planned.check_binding(checked, peer)?;
                    match audiences.is_empty() || claims::is_for(&checked.claims, audiences) {
                        true => Ok(()),
                        false => Err(OTHER_AUDIENCE),
                    }
                };
                let mut worst = missing;
                for token in &tokens.tokens {
                    match fits(&token.checked) {
                        Ok(()) => return Ok(()),
                        Err(refused) => worst = worst.or(refused),
                    }
                }
                Err(worst)
            }
            JwtRequirement::Any(all) => {
                let mut worst = TokenRejection::MISSING;
                for one in all {
                    match self.satisfy(tokens, one, peer) {
                        Ok(()) => return Ok(()),
                        Err(refused) => worst = worst.or(refused),
                    }
                }
                Err(worst)
            }
            JwtRequirement::All(all) => {
                all.iter().try_for_each(|one| self.satisfy(tokens, one, peer))
            }
            JwtRequirement::Missing if tokens.tokens.is_empty() => Ok(()),
            JwtRequirement::Missing => {
                Err(TokenRejection::format("unexpected token: no token is accepted here"))
            }
        }
    }

    /// Verifies the tokens that `requirement` requires, and adds them to `good`.
    fn verify_required<'t>(
        &'t self,
        requirement: &JwtRequirement,
        head: &RequestHead,
        context: &TokenContext<'_>,
        good: &mut Vec<AcceptedToken<'t>>,
    ) -> Result<(), TokenRejection> {
        match requirement {
            JwtRequirement::Provider(name, audiences) => {
                let internal = TokenRejection::new(TokenFault::Internal, "");
                let planned = self.providers.get(name).ok_or(internal)?;
                let checked = planned.check(head, context)?;
                if !audiences.is_empty() && !claims::is_for(&checked.claims, audiences) {
                    return Err(OTHER_AUDIENCE);
                }
                good.push(AcceptedToken { planned, checked });
                Ok(())
            }
            JwtRequirement::Any(all) => {
                let mut worst = TokenRejection::MISSING;
                let mut may_be_missing = false;
                for one in all {
                    if *one == JwtRequirement::Missing {
                        may_be_missing = true;
                        continue;
                    }
                    let before = good.len();
                    match self.verify_required(one, head, context, good) {
                        Ok(()) => return Ok(()),
                        Err(refused) => worst = worst.or(refused),
                    }
                    // Tokens accepted for a part of a failed requirement do not count.
                    good.truncate(before);
                }
                let is_missing =
                    [TokenRejection::MISSING, TokenRejection::NO_BEARER].contains(&worst);
                if may_be_missing && is_missing { Ok(()) } else { Err(worst) }
            }
            JwtRequirement::All(all) => {
                all.iter().try_for_each(|one| self.verify_required(one, head, context, good))
            }
            JwtRequirement::Missing => {
                let none = |planned: &PlannedProvider| {
                    matches!(
                        token_location::find_token(head, &planned.provider.token_locations),
                        TokenLookup::Missing | TokenLookup::OtherCredentials
                    )
                };
                let there = TokenRejection::format("unexpected token: no token is accepted here");
                if self.providers.values().all(none) { Ok(()) } else { Err(there) }
            }
        }
    }
}

#[cfg(test)]
impl TokenPolicy {
    /// The provider with this name.
    pub(crate) fn provider(&self, name: &str) -> Option<&PlannedProvider> {
        self.providers.get(name)
    }
}

impl VerifiedTokens {
    fn add(&mut self, planned: &PlannedProvider, checked: &Rc<VerifiedToken>) {
        if self.subject.is_none() {
            self.subject = checked.claims.get("sub").and_then(Value::as_str).map(str::to_owned);
        }
        self.tokens.push(ProviderToken {
            payload_name: planned.provider.payload_name.clone(),
            provider: planned.number,
            checked: checked.clone(),
        });
        if planned.provider.ends_streams {
            let until = Duration::try_from_secs_f64(checked.times.until).ok();
            let until = until.and_then(|until| UNIX_EPOCH.checked_add(until));
            let until = until.and_then(|until| until.checked_add(planned.provider.leeway));
            // A time beyond the range of the clock sets no limit.
            self.stream_deadline = self.stream_deadline.into_iter().chain(until).min();
        }
    }
}

/// Writes the claims of a token to headers for the service.
fn write_claims(head: &mut RequestHead, provider: &JwtProvider, checked: &VerifiedToken) {
    let mut add = |field: &str, text: &[u8]| {
        let name = HeaderName::from_bytes(field.as_bytes());
        // A claim that is not a valid header value is left out.
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(text)) {
            head.headers.add(name, value);
        }
    };
    for (claim, field) in &provider.claim_headers {
        if let Some(text) = claims::claim_text(&checked.claims, claim) {
            add(field, text.as_bytes());
        }
    }
    if let Some(field) = &provider.payload_header {
        add(field, checked.payload.as_bytes());
    }
}

impl PlannedProvider {
    /// The request's token for this provider, if it is valid now.
    fn check(
        &self,
        head: &RequestHead,
        context: &TokenContext<'_>,
    ) -> Result<Rc<VerifiedToken>, TokenRejection> {
        let text = match token_location::find_token(head, &self.provider.token_locations) {
            TokenLookup::Token(text) => text,
            TokenLookup::Missing => return Err(TokenRejection::MISSING),
            TokenLookup::OtherCredentials => return Err(TokenRejection::NO_BEARER),
            TokenLookup::Several => return Err(TokenRejection::format("several tokens")),
        };
        let key = (digest(text.as_bytes()), self.number);
        let checked = match context.cache.get(&key) {
            Some(found) => found?,
            None => match self.verify(&text) {
                Ok(checked) => {
                    let checked = Rc::new(checked);
                    context.cache.put_good(key, checked.clone());
                    checked
                }
                Err(refused) => {
                    // A later key set may verify the token, so the rejection is not cached.
                    let may_change =
                        self.keys.is_err() || (self.refetch.is_some() && refused == NO_KEY);
                    if !may_change {
                        context.cache.put_bad(key, refused);
                    }
                    return Err(refused);
                }
            },
        };
        checked.times.check(&self.provider, context.now)?;
        self.check_binding(&checked, context.peer)?;
        Ok(checked)
    }

    /// Rejects tokens of other issuers, whose signatures the keys of this one cannot verify.
    fn check_issuer(&self, claims: &Map<String, Value>) -> Result<(), TokenRejection> {
        let issuer = claims.get("iss").and_then(Value::as_str);
        match issuer.is_some_and(|issuer| issuer != self.provider.issuer) {
            true => Err(TokenRejection::OTHER_ISSUER),
            false => Ok(()),
        }
    }

    /// Verifies a token, apart from its validity times and the client's certificate.
    fn verify(&self, text: &str) -> Result<VerifiedToken, TokenRejection> {
        let token = Token::read(text)?;
        self.check_issuer(&token.claims)?;
        let keys = self.keys.as_ref();
        let keys = keys
            .map_err(|fault| TokenRejection::new(*fault, "the issuer's keys are not available"))?;
        match keys.verify(token.signed.signed_text()) {
            SignatureVerdict::Signed => {}
            SignatureVerdict::Unsigned => {
                return Err(TokenRejection::new(TokenFault::Signature, "the signature is invalid"));
            }
            SignatureVerdict::UnknownKey => {
                if let Some(refetch) = &self.refetch {
                    refetch.store(true, Relaxed);
                }
                return Err(NO_KEY);
            }
        }
        let times = claims::check(&token.claims, &self.provider)?;
        let payload = token.signed.payload.into();
        Ok(VerifiedToken { claims: token.claims, times, payload })
    }

    /// Checks that the token was issued to the client with this certificate (RFC 8705, section 3.1).
    fn check_binding(
        &self,
        checked: &VerifiedToken,
        peer: Option<&VerifiedPeer>,
    ) -> Result<(), TokenRejection> {
        let confirmed = checked.claims.get("cnf").and_then(|cnf| cnf.get("x5t#S256"));
        match (confirmed, peer) {
            (None, _) if self.provider.bound => Err(TokenRejection::new(
                TokenFault::ClaimMissing,
                "the token is not bound to a certificate",
            )),
            (None, _) => Ok(()),
            (Some(Value::String(wanted)), Some(peer))
                if *wanted == URL_SAFE_NO_PAD.encode(peer.digest()) =>
            {
                Ok(())
            }
            (Some(_), _) => Err(TokenRejection::new(
                TokenFault::ClaimValue,
                "the token is bound to another certificate",
            )),
        }
    }
}

/// The SHA-256 of bytes.
fn digest(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut array = [0; 32];
    array.iter_mut().zip(digest.as_ref()).for_each(|(to, from)| *to = *from);
    array
}
