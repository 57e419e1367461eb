//! "auto" becomes a value, once, before anything is started.

use super::{Compute, Count, Device, Error, OptimizerState, RunConfig, Transport};

impl RunConfig {
    /// Replaces every "auto" by its value on a machine with `cores` processor cores, of which `cpu_has_bf16` says
    /// whether they have bf16 arithmetic, and `gpus` GPUs.
    pub fn resolve(&mut self, cores: usize, gpus: usize, cpu_has_bf16: bool) -> Result<(), Error> {
        let refuse = |field: &str, problem: String| {
            Err(Error::Field { place: "configuration".into(), field: field.into(), problem })
        };
        let cluster = &mut self.cluster;
        cluster.device = match cluster.device {
            Device::Auto if gpus > 0 => Device::Cuda,
            Device::Auto => Device::Cpu,
            Device::Cuda if gpus == 0 => {
                return refuse(
                    "cluster.device",
                    "is \"cuda\", but this machine has no GPU; set \"cpu\" or \"auto\"".into(),
                )
            }
            device => device,
        };
        let on_cpu = cluster.device == Device::Cpu;
        if on_cpu && cluster.transport == Transport::Nccl {
            let problem = "is \"nccl\", which needs cluster.device = \"cuda\"; set \"auto\" or \"tcp\"";
            return refuse("cluster.transport", problem.into());
        }
        let most = self.train.micro_batches;
        let workers = match cluster.workers {
            Count::Auto if on_cpu => (cores / cluster.threads_per_worker).clamp(1, most),
            Count::Auto => gpus.min(most),
            Count::Exactly(workers) => workers,
        };
        if workers > most {
            return refuse(
                "cluster.workers",
                format!("is {workers}, but train.micro_batches = {most} gives work to at most {most}; set train.micro_batches = {workers}, which changes the result's bits, or cluster.workers = {most}"),
            );
        }
        cluster.workers = Count::Exactly(workers);
        if self.model.compute == Compute::Auto {
            self.model.compute = if !on_cpu || cpu_has_bf16 { Compute::Bf16 } else { Compute::Fp32 };
        }
        if self.train.optimizer_state == OptimizerState::Bf16 && self.model.compute == Compute::Fp32 {
            let problem = "is \"bf16\", but model.compute is \"fp32\" here; set model.compute = \"bf16\", or train.optimizer_state = \"fp32\"";
            return refuse("train.optimizer_state", problem.into());
        }
        Ok(())
    }
}
