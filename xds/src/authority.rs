//! The certificate service: signs certificate requests over gRPC.
//!
//! The API is Istio's `istio.v1.auth.IstioCertificateService`, so Istio's agents can use it. This module is the
//! transport only; a [`CertificateSigner`] decides which client gets which certificate.

use std::sync::Arc;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Response, Status};
use weft_model::SpiffeId;

use crate::dial::Dialer;
use crate::server::{Peer, RequestGate};
use generated::istio_certificate_service_client::IstioCertificateServiceClient;
use generated::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use generated::{IstioCertificateRequest, IstioCertificateResponse};

#[expect(
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/istio.v1.auth.rs"));
}

/// The credentials of a client that requests a certificate.
#[derive(Debug, Clone, Default)]
pub struct Applicant {
    /// The SPIFFE ID of its current certificate, verified by mutual TLS.
    pub peer: Option<SpiffeId>,
    /// The bearer token of the request (a join token).
    pub token: Option<String>,
}

/// Why a certificate was not issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignError {
    /// The applicant's credentials do not permit the certificate.
    Denied(String),
    /// The request is invalid.
    Invalid(String),
    /// The authority cannot sign at the moment.
    Unavailable(String),
}

impl std::fmt::Display for SignError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Denied(text) | Self::Invalid(text) | Self::Unavailable(text) => f.write_str(text),
        }
    }
}

/// Authorizes and signs certificate requests.
pub trait CertificateSigner: Send + Sync + 'static {
    /// Signs a PEM request and returns the chain, leaf first, root last.
    ///
    /// # Errors
    /// When the applicant may not have the certificate, the request is invalid, or the authority cannot sign.
    fn sign(&self, applicant: &Applicant, request_pem: &str) -> Result<Vec<String>, SignError>;

    /// Checks an applicant's credentials before its request is read. Does not consume a join token.
    ///
    /// # Errors
    /// When the applicant has neither a valid certificate nor a valid join token.
    fn admits(&self, applicant: &Applicant) -> Result<(), SignError>;
}

/// The request gate of the certificate service: admits applicants with valid credentials.
pub(crate) fn gate<S: CertificateSigner>(signer: Arc<S>) -> RequestGate {
    Arc::new(move |head| {
        let peer = head.extensions.get::<Peer>().and_then(|peer| peer.id.clone());
        let token = head.headers.get(http::header::AUTHORIZATION);
        let token = bearer(token.and_then(|value| value.to_str().ok()));
        signer.admits(&Applicant { peer, token }).map_err(Status::from)
    })
}

fn bearer(value: Option<&str>) -> Option<String> {
    value?.strip_prefix("Bearer ").map(str::to_owned)
}

impl From<SignError> for Status {
    fn from(error: SignError) -> Self {
        match error {
            SignError::Denied(text) => Self::permission_denied(text),
            SignError::Invalid(text) => Self::invalid_argument(text),
            SignError::Unavailable(text) => Self::unavailable(text),
        }
    }
}

/// The gRPC service of a [`CertificateSigner`].
#[derive(Debug)]
pub(crate) struct CertificateService<S>(pub(crate) Arc<S>);

impl<S: CertificateSigner> CertificateService<S> {
    pub(crate) fn new(signer: Arc<S>) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(Self(signer))
    }
}

#[tonic::async_trait]
impl<S: CertificateSigner> IstioCertificateService for CertificateService<S> {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = request.extensions().get::<Peer>().and_then(|peer| peer.id.clone());
        let token = request.metadata().get("authorization");
        let token = bearer(token.and_then(|value| value.to_str().ok()));
        let signed = self.0.sign(&Applicant { peer, token }, &request.get_ref().csr)?;
        Ok(Response::new(IstioCertificateResponse { cert_chain: signed }))
    }
}

/// Requests a certificate from the certificate service behind `dialer`. `token` is the join token for a first
/// certificate.
///
/// # Errors
/// [`SignError::Denied`] and [`SignError::Invalid`] are final; after [`SignError::Unavailable`] the request can be
/// retried.
pub async fn request_certificate(
    dialer: &Dialer,
    request_pem: String,
    token: Option<&str>,
) -> Result<Vec<String>, SignError> {
    let mut request =
        Request::new(IstioCertificateRequest { csr: request_pem, validity_duration: 0 });
    if let Some(token) = token {
        let value: MetadataValue<Ascii> = format!("Bearer {token}").parse().map_err(|_| {
            SignError::Invalid(
                "invalid join token: must have only characters allowed in a header".into(),
            )
        })?;
        request.metadata_mut().insert("authorization", value);
    }
    let mut client = IstioCertificateServiceClient::new(dialer.channel());
    match client.create_certificate(request).await {
        Ok(response) => Ok(response.into_inner().cert_chain),
        Err(status) => {
            let text = crate::client::explain(&status);
            Err(match status.code() {
                tonic::Code::PermissionDenied | tonic::Code::Unauthenticated => {
                    SignError::Denied(text)
                }
                tonic::Code::InvalidArgument => SignError::Invalid(text),
                _ => SignError::Unavailable(text),
            })
        }
    }
}
