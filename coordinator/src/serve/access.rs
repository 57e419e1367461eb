//! Who may call what: every RPC carries a secret, and every service asks for a role.

use super::accept::Gate;
use super::identity::{now, Seal};
use std::sync::Arc;
use tonic::service::Interceptor;
use tonic::{Request, Status};
use unisono_proto::dial::{Claims, Role, Token};

/// Lets calls through that carry a token of one of `roles`: the run's own, or one under its seal that has not ended.
#[derive(Clone)]
pub struct Access {
    tokens: Arc<Vec<Token>>,
    seal: Seal,
    roles: &'static [Role],
}

/// What a call was let through with, where it was a token that ends: whoever carries such a one is not in yet.
#[derive(Debug, Clone, Copy)]
pub struct Carried(pub Claims);

impl Access {
    pub fn new(tokens: Arc<Vec<Token>>, seal: Seal, roles: &'static [Role]) -> Self {
        Access { tokens, seal, roles }
    }
}

/// How to get another token.
pub fn remedy(role: Role) -> String {
    format!("get another: `unisono token RUN --role {}` on the coordinator's machine makes one", role.name())
}

impl Interceptor for Access {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let sent = request.metadata().get("authorization").map(|v| v.as_bytes()).unwrap_or_default();
        // Every token is tried, so that the time taken tells nothing.
        let own =
            self.tokens.iter().fold(None, |found, token| if token.admits(sent) { Some(token.role()) } else { found });
        let carried = self.seal.open(sent);
        match own.or(carried.map(|(role, _)| role)) {
            Some(role) if !self.roles.contains(&role) => {
                let needed: Vec<&str> = self.roles.iter().map(|r| r.name()).collect();
                Err(Status::permission_denied(format!(
                    "this call needs a token of role {}, and this one is of role {}; take the right one from the run's control.json, or make one with `unisono token RUN`",
                    needed.join(" or "),
                    role.name()
                )))
            }
            Some(role) => {
                if let Some((_, claims @ Claims { ends: Some(ends), .. })) = carried {
                    if let Some(ended) = now().checked_sub(ends) {
                        let (hours, minutes) = (ended / 3600, ended / 60 % 60);
                        return Err(Status::unauthenticated(format!(
                            "this token ended {hours} h {minutes} min ago by the coordinator's clock; {}",
                            remedy(role)
                        )));
                    }
                    request.extensions_mut().insert(Carried(claims));
                }
                request.extensions().get::<Gate>().inspect(|gate| gate.admit());
                Ok(request)
            }
            None => Err(Status::unauthenticated(
                "this call carries no valid token; set UNISONO_TOKEN or UNISONO_TOKEN_FILE to one from the run's control.json, or to one that `unisono token RUN` makes",
            )),
        }
    }
}
