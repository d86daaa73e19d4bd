//! The link over TCP: mutual TLS 1.3, where both sides know one authority that vouches for nobody else.

use std::{io, sync::Arc, time::Duration};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    client::TlsStream as ClientStream,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
        server::WebPkiClientVerifier,
        version::TLS13,
    },
    server::TlsStream as ServerStream,
};

/// The name in every control plane's certificate, whatever its host is called: the authority is the
/// operator's own, and there is nothing else it could mean.
pub const SERVER_NAME: &str = "culvert-control";

/// Why an identity is none.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not as `culvert-control node add` writes it.
    #[error(
        "not an identity: a private key, its certificate and the authority's are needed, as PEM; get one with culvert-control node add"
    )]
    Parts,
    /// Key and certificate do not fit, or one is malformed.
    #[error("not a usable identity: {0}; get another with culvert-control node add")]
    Tls(String),
}

fn tls(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

/// A key, the certificate that goes with it, and the authority that the other side is to come from.
pub struct Identity {
    key: PrivateKeyDer<'static>,
    certificate: CertificateDer<'static>,
    authority: Arc<RootCertStore>,
}

impl Identity {
    /// From PEM: a private key, its certificate, the authority's certificate, the last two in this order.
    ///
    /// # Errors
    /// Something is missing or malformed.
    pub fn of_pem(pem: &[u8]) -> Result<Self, IdentityError> {
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|_| IdentityError::Parts)?;
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem).flatten().collect();
        let [certificate, authority] =
            <[_; 2]>::try_from(certificates).map_err(|_| IdentityError::Parts)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority).map_err(tls)?;
        Ok(Self { key, certificate, authority: Arc::new(roots) })
    }

    /// The certificate, DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }
}

/// A socket that notices within 20 s that the other side is not there any more.
fn watchful(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&stream);
    let probes = TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(5))
        .with_retries(2);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

/// Connects as a node.
#[derive(Clone)]
pub struct Connector(TlsConnector);

impl Connector {
    /// With a node's identity.
    ///
    /// # Errors
    /// The identity is of no use.
    pub fn new(identity: Identity) -> Result<Self, IdentityError> {
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(tls)?
            .with_root_certificates(identity.authority)
            .with_client_auth_cert(vec![identity.certificate], identity.key)
            .map_err(tls)?;
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    /// Shakes hands over a connected socket.
    ///
    /// # Errors
    /// The other side is no control plane of this authority, or does not know this one.
    pub async fn connect(&self, stream: TcpStream) -> io::Result<ClientStream<TcpStream>> {
        let stream = watchful(stream)?;
        let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
        self.0.connect(name, stream).await
    }
}

/// Takes nodes as a control plane.
#[derive(Clone)]
pub struct Acceptor(TlsAcceptor);

impl Acceptor {
    /// With a control plane's identity.
    ///
    /// # Errors
    /// The identity is of no use.
    pub fn new(identity: Identity) -> Result<Self, IdentityError> {
        let provider = Arc::new(ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(identity.authority, provider.clone());
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier.build().map_err(tls)?)
            .with_single_cert(vec![identity.certificate], identity.key)
            .map_err(tls)?;
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// Shakes hands over an accepted socket: the stream, and the certificate the node has shown (DER).
    ///
    /// # Errors
    /// The other side shows no certificate of this authority.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<(ServerStream<TcpStream>, Vec<u8>)> {
        let stream = self.0.accept(watchful(stream)?).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let shown = shown.ok_or_else(|| io::Error::other("no certificate"))?.to_vec();
        Ok((stream, shown))
    }
}

#[cfg(test)]
mod tests {
    use culvert_api::link::{Down, Up};
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use tokio::net::TcpListener;

    use super::*;
    use crate::Peer;

    fn authority() -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn identity(authority: &CertifiedIssuer<'static, KeyPair>, name: &str) -> Identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, authority).unwrap();
        let pem = [key.serialize_pem(), certificate.pem(), authority.pem()].concat();
        Identity::of_pem(pem.as_bytes()).unwrap()
    }

    async fn meet(server: Identity, client: Identity) -> (bool, bool) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shown = client.certificate().to_vec();
        let accept = async {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok((stream, seen)) = Acceptor::new(server).unwrap().accept(stream).await else {
                return false;
            };
            assert_eq!(seen, shown);
            let mut peer = Peer::<Up, Down>::new(stream);
            peer.send(Down::default()).await.is_ok()
        };
        let connect = async {
            let stream = TcpStream::connect(address).await.unwrap();
            let Ok(stream) = Connector::new(client).unwrap().connect(stream).await else {
                return false;
            };
            Peer::<Down, Up>::new(stream).receive().await.is_ok()
        };
        tokio::join!(accept, connect)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn only_those_of_one_authority_meet() {
        let (ours, other) = (authority(), authority());
        let server = |of| identity(of, SERVER_NAME);
        assert_eq!(meet(server(&ours), identity(&ours, "edge-1")).await, (true, true));
        assert_eq!(meet(server(&ours), identity(&other, "edge-1")).await, (false, false));
        assert_eq!(meet(server(&other), identity(&ours, "edge-1")).await, (false, false));
        // A node is no control plane.
        assert!(!meet(identity(&ours, "edge-2"), identity(&ours, "edge-1")).await.1);
    }

    #[test]
    fn what_is_no_identity_is_told() {
        assert!(matches!(Identity::of_pem(b""), Err(IdentityError::Parts)));
        let key = KeyPair::generate().unwrap().serialize_pem();
        assert!(matches!(Identity::of_pem(key.as_bytes()), Err(IdentityError::Parts)));
    }
}
