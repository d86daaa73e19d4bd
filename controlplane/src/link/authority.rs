//! The link's own authority: it vouches for the control planes of one database and for their nodes, and for
//! nobody else.

use anyhow::Context;
use culvert_link::SERVER_NAME;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::{auth::secret_file_with, config::Config};

/// The file of its key in the state directory. Control planes of one database share it.
const FILE: &str = "link-authority.key";
/// How long certificates are good; a node is let go by revoking it.
const LIFE: Duration = Duration::days(3650);

/// Issues identities.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A node's identity, and by what it is known.
pub struct Issued {
    /// Its private key, its certificate and the authority's, as PEM.
    pub pem: String,
    /// The hash of the certificate.
    pub fingerprint: String,
}

/// What is kept of a certificate or a key.
pub(super) fn fingerprint(certificate: &[u8]) -> String {
    blake3::hash(certificate).to_hex().to_string()
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    // A clock that is a little behind must not make it a thing of the future.
    params.not_before = OffsetDateTime::now_utc() - Duration::days(1);
    params.not_after = OffsetDateTime::now_utc() + LIFE;
    params
}

impl Authority {
    /// Takes its key from the state directory, or makes one.
    ///
    /// # Errors
    /// The file cannot be read, written or understood.
    pub fn open(config: &Config) -> anyhow::Result<Self> {
        let path = config.state.dir.join(FILE);
        let new = || Ok(KeyPair::generate().map_err(std::io::Error::other)?.serialize_pem().into());
        let pem = match config.keys.link_authority.text() {
            Some(given) => given.as_bytes().to_vec(),
            None => secret_file_with(&path, new).with_context(|| path.display().to_string())?,
        };
        let key = std::str::from_utf8(&pem).ok().and_then(|pem| KeyPair::from_pem(pem).ok());
        let key = key.with_context(|| {
            format!("{}: not a private key; copy it from the other control plane", path.display())
        })?;
        // Made anew each time: what vouches is the key, and its name is always the same.
        let mut params = params("Culvert link");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self(CertifiedIssuer::self_signed(params, key)?))
    }

    /// What tells its key from others.
    pub fn known_by(&self) -> String {
        fingerprint(self.0.key().public_key_raw())
    }

    /// A new identity of a node.
    ///
    /// # Errors
    /// No key could be made.
    pub fn node(&self, name: &str) -> anyhow::Result<Issued> {
        // The name is for people who look: nodes are told apart by their certificates.
        self.issue(params(name))
    }

    /// A new identity of a control plane.
    ///
    /// # Errors
    /// No key could be made.
    pub fn control_plane(&self) -> anyhow::Result<Issued> {
        let mut params = params(SERVER_NAME);
        params.subject_alt_names =
            CertificateParams::new([SERVER_NAME.to_owned()])?.subject_alt_names;
        self.issue(params)
    }

    fn issue(&self, params: CertificateParams) -> anyhow::Result<Issued> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        let pem = [key.serialize_pem(), certificate.pem(), self.0.pem()].concat();
        Ok(Issued { pem, fingerprint: fingerprint(certificate.der()) })
    }
}
