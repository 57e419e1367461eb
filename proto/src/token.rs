//! Tokens: what lets a worker or a viewer in, and which coordinator it leads to.

use crate::dial::Error;
use rustls::crypto::ring;
use std::fmt;
use std::path::PathBuf;

/// Where the coordinator puts the pass of a worker that it lets in.
pub const PASS: &str = "unisono-pass";

/// What the holder of a token may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Takes part in a run.
    Worker,
    /// Looks on.
    Monitor,
    /// Looks on and commands.
    Operator,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Worker, Role::Monitor, Role::Operator];

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Role::Worker => "worker",
            Role::Monitor => "monitor",
            Role::Operator => "operator",
        }
    }
}

/// What a token says of itself, under the coordinator's seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claims {
    pub id: u64,
    /// Seconds since the Unix epoch; `None`: it ends with the run. Such a one is a pass, which a worker is given when it is let in.
    pub ends: Option<u64>,
    /// Processes that it lets in, each of which gets a pass; `None`: any number.
    pub uses: Option<u32>,
}

impl Claims {
    fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let [id, ends, uses] = parts[..] else { return None };
        // One spelling for each, so that none can be told from another by it.
        let claims = Claims {
            id: u64::from_str_radix(id, 16).ok()?,
            ends: Some(ends.parse().ok()?).filter(|&ends| ends > 0),
            uses: Some(uses.parse().ok()?).filter(|&uses| uses > 0),
        };
        (claims.to_string() == text).then_some(claims)
    }
}

impl fmt::Display for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}-{}", self.id, self.ends.unwrap_or(0), self.uses.unwrap_or(0))
    }
}

/// A role's secret, bound to one coordinator by the hash of its CA certificate. With claims it is made to be carried to other
/// machines, and its secret is the coordinator's seal on them.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    role: Role,
    authority: blake3::Hash,
    claims: Option<Claims>,
    secret: [u8; 32],
}

impl Token {
    /// A new secret for `role` at the coordinator whose CA certificate is `authority` (DER).
    pub fn generate(role: Role, authority: &[u8]) -> Self {
        let mut secret = [0; 32];
        ring::default_provider().secure_random.fill(&mut secret).expect("the system has a source of randomness");
        Token { role, authority: blake3::hash(authority), claims: None, secret }
    }

    /// One with `claims`, which whoever has `key` recognizes.
    pub fn seal(key: &[u8; 32], role: Role, authority: &[u8], claims: Claims) -> Self {
        let secret = *seal(key, role, &claims).as_bytes();
        Token { role, authority: blake3::hash(authority), claims: Some(claims), secret }
    }

    /// What a call's `authorization` value claims, if it was sealed with `key`. Takes the same time for every seal.
    pub fn open(key: &[u8; 32], authorization: &[u8]) -> Option<(Role, Claims)> {
        let text = std::str::from_utf8(authorization).ok()?.strip_prefix("Bearer ")?;
        let parts: Vec<&str> = text.split('.').collect();
        let [role, claims, secret] = parts[..] else { return None };
        let (role, claims) = (Role::parse(role)?, Claims::parse(claims)?);
        (blake3::Hash::from_hex(secret).ok()? == seal(key, role, &claims)).then_some((role, claims))
    }

    /// The pass that the coordinator answered the first call with this token with.
    pub fn pass(&self, answer: &tonic::metadata::MetadataMap) -> Option<Self> {
        let text = answer.get(PASS)?.to_str().ok()?;
        Self::parse(text).ok().filter(|pass| pass.stands_for(self))
    }

    /// Whether it ends before the run does: then it is exchanged for a pass.
    pub fn ends(&self) -> bool {
        self.claims.is_some_and(|claims| claims.ends.is_some())
    }

    /// Whether it is for the same coordinator and role.
    pub fn stands_for(&self, other: &Self) -> bool {
        self.role == other.role && self.authority == other.authority
    }

    pub fn parse(text: &str) -> Result<Self, Error> {
        let fail = |problem| Error::Token { problem };
        let parts: Vec<&str> = text.trim().split('.').collect();
        let (version, role, authority, claims, secret) = match parts[..] {
            [version, role, authority, secret] => (version, role, authority, None, secret),
            [version, role, authority, claims, secret] => (version, role, authority, Some(claims), secret),
            _ => return Err(fail("does not have four or five parts separated by dots")),
        };
        if version != "unisono1" {
            return Err(fail("does not start with \"unisono1.\""));
        }
        let role = Role::parse(role).ok_or(fail("names an unknown role"))?;
        let claims = claims.map(|claims| Claims::parse(claims).ok_or(fail("has damaged claims"))).transpose()?;
        let authority = blake3::Hash::from_hex(authority).map_err(|_| fail("has a damaged certificate hash"))?;
        let secret = blake3::Hash::from_hex(secret).map_err(|_| fail("has a damaged secret"))?;
        Ok(Token { role, authority, claims, secret: *secret.as_bytes() })
    }

    /// From `UNISONO_TOKEN`, else from the file that `UNISONO_TOKEN_FILE` names. Never an argument: those are public.
    pub fn from_environment() -> Result<Self, Error> {
        if let Ok(text) = std::env::var("UNISONO_TOKEN") {
            return Self::parse(&text);
        }
        let path = PathBuf::from(std::env::var_os("UNISONO_TOKEN_FILE").ok_or(Error::NoToken)?);
        let text = std::fs::read_to_string(&path)
            .map_err(|source| Error::TokenFile { path: path.clone(), problem: source.to_string() })?;
        Self::parse(&text)
    }

    /// The whole token, secret included: only for a 0600 file or a child's environment.
    pub fn reveal(&self) -> String {
        let claims = self.claims.map(|claims| format!("{claims}.")).unwrap_or_default();
        format!("unisono1.{}.{}.{claims}{}", self.role.name(), self.authority.to_hex(), self.secret_hex())
    }

    pub fn role(&self) -> Role {
        self.role
    }

    /// Hash of the CA certificate of the coordinator that it is for.
    pub(crate) fn authority(&self) -> blake3::Hash {
        self.authority
    }

    /// Whether a call's `authorization` value presents this token's secret. Takes the same time for every value.
    pub fn admits(&self, authorization: &[u8]) -> bool {
        blake3::hash(authorization) == blake3::hash(self.bearer().as_bytes())
    }

    /// Adds the secret to a call.
    pub fn authorize<T>(&self, request: &mut tonic::Request<T>) {
        let mut value: tonic::metadata::MetadataValue<_> = self.bearer().parse().expect("names and numbers are ASCII");
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }

    fn bearer(&self) -> String {
        match self.claims {
            Some(claims) => format!("Bearer {}.{claims}.{}", self.role.name(), self.secret_hex()),
            None => format!("Bearer {}", self.secret_hex()),
        }
    }

    fn secret_hex(&self) -> String {
        blake3::Hash::from_bytes(self.secret).to_hex().to_string()
    }
}

fn seal(key: &[u8; 32], role: Role, claims: &Claims) -> blake3::Hash {
    blake3::keyed_hash(key, format!("unisono1.{}.{claims}", role.name()).as_bytes())
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}, authority {}, secret withheld)", self.role.name(), &self.authority.to_hex()[..8])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_hides_its_secret() {
        let token = Token::generate(Role::Worker, b"certificate");
        let text = token.reveal();
        let parsed = Token::parse(&format!("{text}\n")).unwrap();
        assert_eq!(parsed, token);
        let secret = text.rsplit('.').next().unwrap();
        assert!(!format!("{token:?}").contains(secret));
        assert_ne!(Token::generate(Role::Worker, b"certificate"), token);
        let mut request = tonic::Request::new(());
        token.authorize(&mut request);
        assert!(!format!("{request:?}").contains(secret));
        let sent = request.metadata().get("authorization").unwrap();
        assert!(token.admits(sent.as_bytes()));
        assert!(!Token::generate(Role::Worker, b"certificate").admits(sent.as_bytes()));
    }

    #[test]
    fn what_a_token_claims_cannot_be_changed() {
        let key = [7; 32];
        let claims = Claims { id: 0xfeed, ends: Some(1_800_000_000), uses: Some(4) };
        let token = Token::seal(&key, Role::Worker, b"certificate", claims);
        assert_eq!(Token::parse(&token.reveal()).unwrap(), token);
        let bearer = token.bearer();
        assert_eq!(Token::open(&key, bearer.as_bytes()), Some((Role::Worker, claims)));
        assert_eq!(Token::open(&[8; 32], bearer.as_bytes()), None);
        let changes = [
            ("worker", "operator"),
            ("1800000000", "1900000000"),
            ("1800000000", "0"),
            ("-4", "-5"),
            ("-4", "-04"),
            ("000feed", "000feee"),
        ];
        for (from, to) in changes {
            let changed = bearer.replace(from, to);
            assert!(changed != bearer && Token::open(&key, changed.as_bytes()).is_none(), "{changed}");
        }
        let secret = token.reveal().rsplit('.').next().unwrap().to_owned();
        assert!(!token.admits(format!("Bearer {secret}").as_bytes()) && token.admits(bearer.as_bytes()));
        for claims in ["", "1-2", "000000000000feed-1-2-3", "feed-1-2", "000000000000feed--1", "000000000000feed-x-1"] {
            assert_eq!(Claims::parse(claims), None, "{claims}");
        }
    }

    #[test]
    fn damaged_tokens_are_refused_without_repeating_them() {
        let good = Token::generate(Role::Monitor, b"certificate").reveal();
        let bad = [
            "".into(),
            good.replace("unisono1", "unisono2"),
            good.replace("monitor", "king"),
            good[..good.len() - 1].into(),
        ];
        for text in bad {
            let message = Token::parse(&text).unwrap_err().to_string();
            assert!(message.contains("copy it whole"), "{message}");
            assert!(text.is_empty() || !message.contains(&text));
        }
    }
}
