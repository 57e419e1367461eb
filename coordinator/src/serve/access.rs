//! Who may call what: every RPC carries a secret, and every service asks for a role.

use super::accept::Gate;
use std::sync::Arc;
use tonic::service::Interceptor;
use tonic::{Request, Status};
use unisono_proto::dial::{Role, Token};

/// Lets calls through that carry a token of one of `roles`.
#[derive(Clone)]
pub struct Access {
    tokens: Arc<Vec<Token>>,
    roles: &'static [Role],
}

impl Access {
    pub fn new(tokens: Arc<Vec<Token>>, roles: &'static [Role]) -> Self {
        Access { tokens, roles }
    }
}

impl Interceptor for Access {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let sent = request.metadata().get("authorization").map(|v| v.as_bytes()).unwrap_or_default();
        // Every token is tried, so that the time taken tells nothing.
        let role =
            self.tokens.iter().fold(None, |found, token| if token.admits(sent) { Some(token.role()) } else { found });
        match role {
            Some(role) if self.roles.contains(&role) => {
                request.extensions().get::<Gate>().inspect(|gate| gate.admit());
                Ok(request)
            }
            Some(role) => {
                let needed: Vec<&str> = self.roles.iter().map(|r| r.name()).collect();
                Err(Status::permission_denied(format!(
                    "this call needs a token of role {}, and this one is of role {}; take the right one from the run's control.json",
                    needed.join(" or "),
                    role.name()
                )))
            }
            None => Err(Status::unauthenticated(
                "this call carries no valid token; set UNISONO_TOKEN or UNISONO_TOKEN_FILE to one from the run's control.json",
            )),
        }
    }
}
