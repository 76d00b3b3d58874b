//! The server's certificate.

use std::sync::Arc;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
};

/// A certificate for this machine that vouches for itself.
pub(super) struct Authority {
    certified: CertifiedKey<rcgen::KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    pub(super) fn new() -> Self {
        let names = vec!["127.0.0.1".to_owned()];
        let certified = generate_simple_self_signed(names).expect("a certificate");
        Self { certified }
    }

    pub(super) fn pem(&self) -> String {
        self.certified.cert.pem()
    }

    pub(super) fn server_config(&self) -> Arc<ServerConfig> {
        let key = self.certified.signing_key.serialize_pem();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions of TLS")
            .with_no_client_auth()
            .with_single_cert(vec![self.certified.cert.der().clone()], key)
            .expect("a certificate and its key");
        Arc::new(config)
    }
}
