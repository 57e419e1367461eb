//! Who may call what: every RPC that the protocol describes, with every kind of token that must not do and those that must.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use unisono::serve::identity::{Identity, Terms};
use unisono_proto::dial::{self, dial, training, Role, Token};
use unisono_proto::v1::{worker_message, BatchKey, BatchRequest, Fingerprint, Join, StatusReply, Suite, WorkerMessage};
use unisono_proto::MAX_MESSAGE_BYTES;
use unisono_tests::fake_worker::{End, FakeWorker};
use unisono_tests::served::{Served, Serving};

/// Paths of all RPCs, and who may call them.
fn calls() -> BTreeMap<String, &'static [Role]> {
    let mut calls = BTreeMap::new();
    let mut service = String::new();
    for text in [
        include_str!("../../proto/unisono/v1/training.proto"),
        include_str!("../../proto/unisono/v1/monitor.proto"),
        include_str!("../../proto/unisono/v1/common.proto"),
    ] {
        for line in text.lines().map(str::trim_start) {
            let name = |line: &str| line.split(['(', ' ', '{']).next().unwrap().to_owned();
            if let Some(rest) = line.strip_prefix("service ") {
                service = name(rest);
            } else if let Some(rest) = line.strip_prefix("rpc ") {
                let roles: &[Role] = match service.as_str() {
                    "Training" => &[Role::Worker],
                    "Monitor" => &[Role::Monitor, Role::Operator],
                    other => panic!("who may call {other}?"),
                };
                calls.insert(format!("/unisono.v1.{service}/{}", name(rest)), roles);
            }
        }
    }
    assert!(calls.len() >= 4, "{calls:?}");
    calls
}

/// How a call with this `authorization` is answered; `None`: it is let through, and has nothing to say yet.
async fn call(channel: &Channel, path: &str, authorization: Option<&[u8]>, message: Join) -> Option<Status> {
    let mut request = Request::new(message);
    if let Some(value) = authorization {
        let value = tonic::codegen::http::HeaderValue::from_bytes(value).unwrap();
        request.metadata_mut().as_mut().insert("authorization", value);
    }
    let mut grpc = Grpc::new(channel.clone());
    let path: PathAndQuery = path.parse().unwrap();
    grpc.ready().await.unwrap();
    let answer = grpc.unary(request, path, ProstCodec::<Join, StatusReply>::default());
    tokio::time::timeout(Duration::from_millis(500), answer).await.ok()?.err()
}

fn bearer(token: &Token) -> Vec<u8> {
    let mut request = Request::new(());
    token.authorize(&mut request);
    request.metadata().get("authorization").unwrap().as_bytes().to_vec()
}

/// Whether a call was kept out, and not only found wrong.
fn kept_out(status: &Option<Status>) -> Option<Code> {
    let code = status.as_ref()?.code();
    matches!(code, Code::Unauthenticated | Code::PermissionDenied).then_some(code)
}

async fn channel(serving: &Serving) -> Channel {
    dial(&serving.control.address, &serving.control.token(Role::Monitor).unwrap()).await.unwrap()
}

const DAY: Terms = Terms { hours: 24.0, uses: None };

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_a_token_of_the_run_that_has_not_ended() {
    let served = Served::new(30, 1);
    let serving = served.start("run", served.training()).await;
    let (seal, channel) = (Identity::seal_of(&serving.run_dir).unwrap(), channel(&serving).await);
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = Identity::of(elsewhere.path()).unwrap().seal;
    for (path, roles) in calls() {
        let role = roles[0];
        let good = bearer(&seal.invite(role, DAY));
        let text = String::from_utf8(good.clone()).unwrap();
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let later = text.replacen("-1", "-2", 1);
        assert_ne!(later, text, "the end begins with 1 until 2033");
        let bad: Vec<(&str, Option<Vec<u8>>)> = vec![
            ("none", None),
            ("empty", Some(Vec::new())),
            ("not a token", Some(b"Bearer of news".to_vec())),
            ("not text", Some(vec![0xff; 40])),
            ("of another coordinator", Some(bearer(&foreign.invite(role, DAY)))),
            ("a worker's of another kind", Some(bearer(&Token::generate(role, b"another coordinator")))),
            ("ended", Some(bearer(&seal.invite(role, Terms { hours: 0.0, uses: None })))),
            ("damaged", Some(flipped)),
            ("made to end later", Some(later.into_bytes())),
            ("without its scheme", Some(good["Bearer ".len()..].to_vec())),
        ];
        for (what, sent) in bad {
            let answer = call(&channel, &path, sent.as_deref(), Join::default()).await;
            assert_eq!(kept_out(&answer), Some(Code::Unauthenticated), "{path} with a token: {what}: {answer:?}");
            if what == "ended" {
                let sentence = answer.unwrap().message().to_owned();
                assert!(
                    sentence.contains("ended 0 h 0 min ago") && sentence.contains("unisono token RUN"),
                    "{sentence}"
                );
            }
        }
        let stuffed = call(&channel, &path, Some(&[b'x'; 20_000]), Join::default()).await;
        assert!(stuffed.is_some(), "{path} with a header of 20 kB");
    }
    // A token of another run is found out before anything is sent.
    let token = foreign.invite(Role::Worker, DAY);
    let refused = dial(&serving.control.address, &token).await.unwrap_err();
    assert!(matches!(refused, dial::Error::WrongAuthority { .. }), "{refused}");
    assert!(refused.to_string().contains("nothing secret was sent"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_role_calls_what_is_its_own() {
    let served = Served::new(30, 1);
    let serving = served.start("run", served.training()).await;
    let (seal, channel) = (Identity::seal_of(&serving.run_dir).unwrap(), channel(&serving).await);
    for (path, roles) in calls() {
        for role in Role::ALL {
            // What workers go on with is the pass; to monitors and operators their token is good until it ends.
            let carried = if role == Role::Worker { seal.pass() } else { seal.invite(role, DAY) };
            for token in [serving.control.token(role).unwrap(), carried] {
                let answer = call(&channel, &path, Some(&bearer(&token)), Join::default()).await;
                let expected = (!roles.contains(&role)).then_some(Code::PermissionDenied);
                assert_eq!(kept_out(&answer), expected, "{path} as {}: {answer:?}", role.name());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_beyond_the_limit_is_refused_by_every_call() {
    let served = Served::new(30, 1);
    let serving = served.start("run", served.training()).await;
    let channel = channel(&serving).await;
    for (path, roles) in calls() {
        let huge = Join { host: "x".repeat(MAX_MESSAGE_BYTES + 1), ..Default::default() };
        let token = bearer(&serving.control.token(roles[0]).unwrap());
        let answer = call(&channel, &path, Some(&token), huge).await;
        let code = answer.as_ref().map(Status::code);
        assert!(matches!(code, Some(Code::OutOfRange | Code::InvalidArgument)), "{path}: {answer:?}");
    }
}

/// Lets `token` in as a worker of the run's arithmetic, or of another; its pass.
async fn attend(serving: &Serving, token: &Token, libtorch: &str) -> Result<Token, Status> {
    let mut client = training(dial(&serving.control.address, token).await.unwrap());
    let (sender, messages) = tokio::sync::mpsc::channel(1);
    let fingerprint = Some(Fingerprint { device: "cpu".into(), libtorch: libtorch.into(), ..Fingerprint::default() });
    let join = Join { listen: "nowhere:1".into(), fingerprint, ..Join::default() };
    sender.send(WorkerMessage { epoch: None, body: Some(worker_message::Body::Join(join)) }).await.unwrap();
    let mut request = Request::new(ReceiverStream::new(messages));
    token.authorize(&mut request);
    let answer = client.attend(request).await?;
    Ok(token.pass(answer.metadata()).expect("whoever is let in gets a pass"))
}

async fn batch(serving: &Serving, token: &Token) -> Result<u64, Status> {
    let mut client = training(dial(&serving.control.address, token).await.unwrap());
    let (sender, requests) = tokio::sync::mpsc::channel(1);
    let key = BatchKey { suite: Suite::Train.into(), step: 1, micro_batch: 0 };
    sender.send(BatchRequest { key: Some(key) }).await.unwrap();
    let mut request = Request::new(ReceiverStream::new(requests));
    token.authorize(&mut request);
    let batch = client.batches(request).await?.into_inner().message().await?;
    Ok(batch.unwrap().tokens.len() as u64)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_lets_in_as_many_as_it_is_for_and_a_pass_stays_good() {
    let served = Served::new(30, 1);
    let serving = served.start("run", served.training()).await;
    let seal = Identity::seal_of(&serving.run_dir).unwrap();
    let token = seal.invite(Role::Worker, Terms { hours: 1.0, uses: Some(2) });
    let refused = batch(&serving, &token).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "rows go to nobody who was not let in: {refused}");
    let first = attend(&serving, &token, "none").await.unwrap();
    for _ in 0..2 {
        let refused = attend(&serving, &token, "another").await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("libtorch \"another\""), "{refused}");
    }
    // Who was refused for something else has not used it.
    let passes = [first, attend(&serving, &token, "none").await.unwrap()];
    assert_ne!(passes[0], passes[1]);
    let refused = attend(&serving, &token, "none").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("was for 2 workers and has let as many in"), "{refused}");
    assert!(refused.message().contains("unisono token RUN --role worker"), "{refused}");
    for pass in &passes {
        assert!(batch(&serving, pass).await.unwrap() > 0);
        let mut client = training(dial(&serving.control.address, pass).await.unwrap());
        let mut request = Request::new(ReceiverStream::new(tokio::sync::mpsc::channel::<WorkerMessage>(1).1));
        pass.authorize(&mut request);
        let again = client.attend(request).await.unwrap();
        assert_eq!(pass.pass(again.metadata()), None, "it needs no other");
    }
    // And a whole run with one: a worker that comes again with its pass.
    let worker = FakeWorker::new(&serving.control.address, passes[0].clone(), served.layout());
    let end = worker.live().await;
    assert!(matches!(end, End::Drained { .. }), "{end:?}");
    assert_eq!(serving.outcome().await.failure, None);
}
