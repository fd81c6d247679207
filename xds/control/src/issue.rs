//! Decides which certificate requests are signed.
//!
//! A workload with a valid certificate may renew it for the same identity. A workload without one presents a join token,
//! which is valid once, for one identity.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use weft_certs::request::{self, CheckedRequest};
use weft_certs::{Authority, IssuedCertificate, KeyText};
use weft_model::SpiffeId;
use weft_xds::authority::{Applicant, CertificateSigner, SignError};

use crate::audit;
use crate::audit_limit::{AuditDecision, AuditLimit};
use crate::ca_rotation::CurrentAuthorities;
use crate::clock::{SteadyClock, monotonic};
use crate::store::{Store, StoreError};

/// The default lifetime of a workload certificate.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// The lifetime of a join token.
pub const TOKEN_LIFE: Duration = Duration::from_secs(3600);

/// Decides about certificate requests, and signs certificates.
#[derive(Debug)]
pub struct CertificateIssuer {
    /// The authorities that sign.
    pub authorities: Arc<CurrentAuthorities>,
    /// Where certificates and join tokens are stored.
    pub store: Arc<Store>,
    /// The lifetime of certificates.
    pub life: Duration,
    /// The clock for the dates of certificates.
    pub(crate) clock: Arc<SteadyClock>,
    /// Limits the audit lines about refused requests.
    pub(crate) refusals: Mutex<AuditLimit>,
}

impl CertificateSigner for CertificateIssuer {
    fn sign(&self, applicant: &Applicant, request_pem: &str) -> Result<Vec<String>, SignError> {
        let signed = self.decide(applicant, request_pem);
        signed.inspect_err(|refused| self.audit_refusal(applicant, refused))
    }

    fn admits(&self, applicant: &Applicant) -> Result<(), SignError> {
        let admitted = self.clock.steady().map_err(SignError::Unavailable);
        let admitted = admitted.and_then(|now| match (&applicant.peer, &applicant.token) {
            (Some(_), _) => Ok(()),
            (None, None) => Err(no_proof()),
            (None, Some(token)) => {
                let is_known = self.store.is_token_valid(&digest(token), now);
                if is_known.map_err(unavailable)? { Ok(()) } else { Err(unknown_token()) }
            }
        });
        admitted.inspect_err(|refused| self.audit_refusal(applicant, refused))
    }
}

fn no_proof() -> SignError {
    SignError::Denied("no client certificate and no join token".into())
}

fn unknown_token() -> SignError {
    SignError::Denied("invalid join token: unknown, already used, or expired".into())
}

impl CertificateIssuer {
    fn decide(&self, applicant: &Applicant, request_pem: &str) -> Result<Vec<String>, SignError> {
        let now = self.clock.steady().map_err(SignError::Unavailable)?;
        let request = CheckedRequest::parse(request_pem)
            .map_err(|error| SignError::Invalid(error.to_string()))?;
        self.check_applicant(applicant, request.identity(), now)?;
        let issued = self
            .authorities
            .get()
            .signing()
            .issue(&request, self.life, now)
            .map_err(|error| SignError::Invalid(error.to_string()))?;
        self.record_and_log(&request, &issued, now)?;
        Ok(issued.chain)
    }

    /// Writes a refusal to the audit log, unless the limit of such lines is reached.
    fn audit_refusal(&self, applicant: &Applicant, refused: &SignError) {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let AuditDecision::Write { suppressed } = refusals.take(monotonic()) else {
            return;
        };
        let peer = applicant.peer.as_ref().map_or("-", SpiffeId::as_str);
        let reason = refused.to_string();
        let before = suppressed.to_string();
        let fields = [("peer", peer), ("reason", &reason), ("suppressed_before", &before)];
        audit::line(self.store.path(), "refused", &fields);
    }

    /// Issues a certificate for the control plane itself.
    ///
    /// # Errors
    /// The clock is not steady, or signing or the store fails.
    pub(crate) fn sign_own(
        &self,
        request: &CheckedRequest,
    ) -> Result<IssuedCertificate, SignError> {
        let now = self.clock.steady().map_err(SignError::Unavailable)?;
        let issued = self
            .authorities
            .get()
            .issue_own(request, self.life, now)
            .map_err(|error| SignError::Invalid(error.to_string()))?;
        self.record_and_log(request, &issued, now)?;
        Ok(issued)
    }

    fn record_and_log(
        &self,
        request: &CheckedRequest,
        issued: &IssuedCertificate,
        now: SystemTime,
    ) -> Result<(), SignError> {
        record(&self.store, request, issued, now).map_err(unavailable)?;
        tracing::info!(identity = %request.identity(), serial = issued.serial, "certificate issued");
        Ok(())
    }

    fn check_applicant(
        &self,
        applicant: &Applicant,
        wanted: &SpiffeId,
        now: SystemTime,
    ) -> Result<(), SignError> {
        if let Some(peer) = &applicant.peer {
            if peer == wanted {
                return Ok(());
            }
            return Err(SignError::Denied(format!(
                "invalid SPIFFE ID {:?}: a client with the certificate of {peer} may only request a certificate for its own ID",
                wanted.as_str()
            )));
        }
        let Some(token) = &applicant.token else {
            return Err(no_proof());
        };
        match self.store.redeem_token(&digest(token), now).map_err(unavailable)? {
            Some(identity) if identity == wanted.as_str() => Ok(()),
            Some(identity) => Err(SignError::Denied(format!(
                "invalid SPIFFE ID {:?}: the join token is for {identity:?}",
                wanted.as_str()
            ))),
            None => Err(unknown_token()),
        }
    }
}

/// Stores an issued certificate, and writes a line to the audit log.
fn record(
    store: &Store,
    request: &CheckedRequest,
    issued: &IssuedCertificate,
    now: SystemTime,
) -> Result<(), StoreError> {
    store.record_issued(&issued.serial, request.identity(), issued.not_after, now)?;
    let fields = [("identity", request.identity().as_str()), ("serial", &issued.serial)];
    audit::line(store.path(), "issued", &fields);
    Ok(())
}

/// A certificate with its private key, both generated on the authority's host.
#[derive(Debug)]
pub struct KeyAndCertificate {
    /// The issued certificate with its chain.
    pub issued: IssuedCertificate,
    /// The private key, PEM.
    pub key: KeyText,
}

/// Generates a key and issues a certificate for an identity, without a request from a workload.
///
/// # Errors
/// The authority cannot sign, or the store fails.
pub fn issue_locally(
    store: &Store,
    identity: &SpiffeId,
    life: Duration,
    now: SystemTime,
) -> Result<KeyAndCertificate, String> {
    let (files, trust_domain) = store.authority().map_err(|error| error.to_string())?;
    let authority = Authority::load(files, &trust_domain).map_err(|error| error.to_string())?;
    let pending = request::make(identity).map_err(|error| error.to_string())?;
    let request = CheckedRequest::parse(&pending.request_pem).map_err(|error| error.to_string())?;
    let issued = authority.issue(&request, life, now).map_err(|error| error.to_string())?;
    record(store, &request, &issued, now).map_err(|error| error.to_string())?;
    Ok(KeyAndCertificate { issued, key: pending.key_pem })
}

/// Checks that an identity belongs to the trust domain of a store's authority.
///
/// # Errors
/// The store fails, or the identity belongs to another trust domain.
pub fn check_trust_domain(store: &Store, identity: &SpiffeId) -> Result<(), String> {
    let (_, own) = store.authority().map_err(|error| error.to_string())?;
    if identity.trust_domain() == own {
        return Ok(());
    }
    Err(format!(
        "invalid SPIFFE ID {:?}: its trust domain is {:?}, and this authority's is {own:?}",
        identity.as_str(),
        identity.trust_domain()
    ))
}

/// Creates a join token for an identity. The caller gets its only copy: the store keeps its SHA-256 digest.
///
/// # Errors
/// The store or the random number generator fails.
pub fn create_join_token(
    store: &Store,
    identity: &SpiffeId,
    now: SystemTime,
) -> Result<String, StoreError> {
    let token = weft_certs::random_token()
        .ok_or_else(|| StoreError::Database("the random number generator failed".into()))?;
    store.add_token(&digest(&token), identity, now + TOKEN_LIFE)?;
    Ok(token)
}

fn digest(token: &str) -> String {
    weft_certs::digest(token.as_bytes())
}

#[expect(clippy::needless_pass_by_value, reason = "map_err passes it by value")]
fn unavailable(error: StoreError) -> SignError {
    tracing::error!(%error, "store failed");
    SignError::Unavailable("the store failed".into())
}
