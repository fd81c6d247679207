//! Verifiers that accept any certificate: of a client whose chain is forwarded to the service, and of a server when no trust
//! bundle is configured. The handshake proves only that the peer has the private key of the certificate.

use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DistinguishedName, Error};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::fault::{PeerFault, PeerRefusal};
use crate::profile::UNREADABLE;
use crate::signature::signatures;
use crate::verify::PRESENTED_LIMIT;

/// The maximum size of a chain in bytes. The whole chain is forwarded in one header, where it is about 1.5 times as large.
const CHAIN_BYTES_LIMIT: usize = 32 * 1024;

/// Accepts any client chain that is small enough to be forwarded.
#[derive(Debug)]
pub(crate) struct AnyClient {
    pub(crate) mandatory: bool,
}

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        check_size(end_entity, intermediates)
            .and_then(|()| check_form(end_entity))
            .map_err(|refusal| refusal.into_error(end_entity))?;
        Ok(ClientCertVerified::assertion())
    }

    signatures!();
}

/// Accepts the certificate of any server.
#[derive(Debug)]
pub(crate) struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        check_form(end_entity).map_err(|refusal| refusal.into_error(end_entity))?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}

/// Checks that the chain is small enough to be forwarded.
fn check_size(
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Result<(), PeerRefusal> {
    let bytes = std::iter::once(end_entity).chain(intermediates).map(|one| one.len());
    if bytes.sum::<usize>() > CHAIN_BYTES_LIMIT {
        let detail = "certificate chain is too large to be forwarded";
        return Err(PeerFault::MaxSizeExceeded.because(detail));
    }
    if intermediates.len() > PRESENTED_LIMIT {
        return Err(PeerFault::MaxChainDepthExceeded.because("too many certificates presented"));
    }
    Ok(())
}

/// Checks that the certificate can be read.
fn check_form(certificate: &CertificateDer<'_>) -> Result<(), PeerRefusal> {
    match webpki::EndEntityCert::try_from(certificate) {
        Ok(_) => Ok(()),
        Err(_) => Err(PeerFault::Invalid.because(UNREADABLE)),
    }
}
